"""Training pictures of the zoo: archives decoded once into memory, augmented a whole batch at a time."""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Pictures:
    """Decoded pictures of one or more archives.

    Args:
        images: RGB, of any sizes.
        labels: class indices, int64 (n,).
        classes: the classes' folder names, sorted; a label is an index into them.
    """

    images: list[Image.Image]
    labels: Tensor
    classes: list[str]


def read_archives(paths: list[Path]) -> Pictures:
    """Pictures of zip archives of class folders; all archives together give the classes."""
    found: list[tuple[str, Image.Image]] = []
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png")))
            found += [(n.split("/")[-2], Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names]
    classes = sorted({name for name, _ in found})
    index = {name: i for i, name in enumerate(classes)}
    return Pictures([image for _, image in found], torch.tensor([index[name] for name, _ in found]), classes)


def squash(images: list[Image.Image], size: int) -> tuple[Tensor, Tensor]:
    """All pictures as uint8 (n, 3, size, size), and their true width / height ratios (n,)."""
    data = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for i, image in enumerate(images):
        raw = (image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)).tobytes()
        data[i] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    return data, torch.tensor([image.width / image.height for image in images])


def augment(data: Tensor, aspect: Tensor, size: int, settings: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Crops, flips and changed colours for a batch of pictures uint8 (n, 3, h, w); float (n, 3, size, size) in 0..1.

    `settings`: `crop` "resized" (random area from `area` to 1, random aspect) or "shifted" (by at most
    `pad` pixels, or where the picture is larger than `size` also within it); `colour`, by how much brightness,
    contrast and (for "resized") saturation vary. Draws from `generator` only.
    """
    amount = settings.get("colour", 0.4)
    if settings.get("crop", "resized") == "shifted":
        x = _shifted(data, size, settings.get("pad", 4), generator)
    else:
        x = _resized(data, aspect, size, settings.get("area", 0.35), generator)
        gray = x.mean(1, keepdim=True)
        x = gray + (x - gray) * _uniform(x, 1 - amount, 1 + amount, generator).view(-1, 1, 1, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    contrast, brightness = (_uniform(x, 1 - amount, 1 + amount, generator).view(-1, 1, 1, 1) for _ in range(2))
    return (mean + (x - mean) * contrast) * brightness


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """One number for each picture, drawn on the CPU so that a seed means the same on every device."""
    return (torch.rand(len(like), generator=generator) * (high - low) + low).to(like.device)


def _resized(data: Tensor, aspect: Tensor, size: int, smallest: float, generator: torch.Generator) -> Tensor:
    area = _uniform(data, smallest, 1.0, generator)
    ratio = _uniform(data, math.log(3 / 4), math.log(4 / 3), generator).exp()
    width = (area * ratio / aspect).sqrt().clamp(max=1)
    height = (area * aspect / ratio).sqrt().clamp(max=1)
    flip = torch.where(_uniform(data, 0, 1, generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(len(data), 2, 3, device=data.device)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, _uniform(data, -1, 1, generator) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, _uniform(data, -1, 1, generator) * (1 - height)
    grid = F.affine_grid(theta, [len(data), 3, size, size], align_corners=False)
    return F.grid_sample(data.float() / 255, grid, align_corners=False, padding_mode="reflection")


def _shifted(data: Tensor, size: int, pad: int, generator: torch.Generator) -> Tensor:
    """Whole-pixel crops: no interpolation, so a tenth of the cost of resized ones."""
    n, _, height, width = data.shape
    x = F.pad(data.float() / 255, (pad,) * 4, mode="reflect")
    top = (_uniform(data, 0, height + 2 * pad - size + 1, generator)).long().clamp(max=height + 2 * pad - size)
    left = (_uniform(data, 0, width + 2 * pad - size + 1, generator)).long().clamp(max=width + 2 * pad - size)
    steps = torch.arange(size, device=data.device)
    flip = _uniform(data, 0, 1, generator) < 0.5
    columns = torch.where(flip[:, None], steps.flip(0), steps) + left[:, None]
    rows = steps + top[:, None]
    picture = torch.arange(n, device=data.device)
    # an index before and after the channels puts channels last: that is the layout the nets take
    return x[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
