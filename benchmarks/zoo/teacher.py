"""Soft labels for the training pictures from nets that are already trained (knowledge distillation)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from pictures import squash
from PIL import Image
from torch import Tensor

from qhyvit import load_model
from qhyvit.models.zoo import zoo_weights


def soft_labels(
    teachers: list[str], images: list[Image.Image], device: torch.device, cache: Path, batch: int = 128
) -> Tensor:
    """Mean class probabilities of the teachers on whole pictures and their mirror images, float32 (n, classes).

    Each teacher's are computed once and kept under `cache`, by the content of its weights: on a CPU this is minutes of
    work, and several students use it. That the students see shifted pictures, and the labels are those of the whole, is
    meant.

    Args:
        teachers: nets of the zoo, such as "zoo/mobilevit_xxs".
        images: the training pictures, in the order of the labels that are returned.
        device: where the teachers run.
        cache: folder.
        batch: pictures at a time.
    """
    return torch.stack([_kept(name, images, device, cache, batch) for name in teachers]).mean(0)


def _kept(teacher: str, images: list[Image.Image], device: torch.device, cache: Path, batch: int) -> Tensor:
    key = hashlib.sha256(zoo_weights(teacher).read_bytes()).hexdigest()[:12]
    path = cache / f"soft-labels-{len(images)}-{key}.pt"
    if not path.exists():
        beside = path.with_suffix(".part")
        torch.save(_probabilities(teacher, images, device, batch).half().cpu(), beside)
        beside.replace(path)
    return torch.load(path, weights_only=True).float().to(device)


def _probabilities(teacher: str, images: list[Image.Image], device: torch.device, batch: int) -> Tensor:
    loaded = load_model(teacher)
    module = loaded.module.to(device, memory_format=torch.channels_last)
    config = loaded.preprocessing_config
    mean, std = (torch.tensor(config[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    data, _ = squash(images, config["input_size"][-1])
    rows = []
    with torch.no_grad():
        for part in data.split(batch):
            x = ((part.to(device).float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
            rows.append((module(x).softmax(1) + module(x.flip(3)).softmax(1)) / 2)
    return torch.cat(rows)
