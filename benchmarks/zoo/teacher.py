"""Soft labels for the training pictures from nets that are already trained (knowledge distillation)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from qhyvit import load_model
from qhyvit.models.zoo import zoo_weights


def soft_labels(
    teachers: list[str], data: Tensor, mean: Tensor, std: Tensor, cache: Path, batch: int = 128
) -> Tensor:
    """Mean class probabilities of the teachers on whole pictures and their mirror images, float32 (n, classes).

    Computed once and kept under `cache`, by the content of the teachers' weights: on a CPU this is minutes of work, and
    several students use it. That the students see shifted pictures, and the labels are those of the whole, is meant.

    Args:
        teachers: nets of the zoo, such as "zoo/mobilevit_xxs".
        data: pictures uint8 (n, 3, size, size), of the size that the teachers take.
        mean, std: (1, 3, 1, 1) on the device that computes.
        cache: folder.
        batch: pictures at a time.
    """
    key = hashlib.sha256(b"".join(zoo_weights(name).read_bytes() for name in teachers) + bytes(data.shape[-1]))
    path = cache / f"soft-labels-{len(data)}-{key.hexdigest()[:12]}.pt"
    if path.exists():
        return torch.load(path, weights_only=True).float().to(mean.device)
    total: Tensor | None = None
    for teacher in teachers:
        module = load_model(teacher).module
        module = module.to(mean.device, memory_format=torch.channels_last)
        rows = []
        with torch.inference_mode():
            for part in data.split(batch):
                x = ((part.to(mean.device).float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
                rows.append((module(x).softmax(1) + module(x.flip(3)).softmax(1)) / 2)
        total = torch.cat(rows) if total is None else total + torch.cat(rows)
    assert total is not None
    beside = path.with_suffix(".part")
    torch.save((total / len(teachers)).half().cpu(), beside)
    beside.replace(path)
    return (total / len(teachers)).clone()
