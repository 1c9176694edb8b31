"""Further views of calibration pictures: random crops, resized, half of them mirrored."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_AREA = 0.5  # of the picture, that a crop keeps


def with_views(batches: Iterable[Tensor], views: int, seed: int = 0) -> list[list[Tensor]]:
    """Each batch as it is and `views` - 1 times anew, as training's random resized crops show its pictures.

    Args:
        batches: pictures (n, 3, H, W).
        views: of each picture in all, at least 1.
        seed: of crops and mirroring.

    Returns:
        For each batch its views, each (n, 3, H, W); the first is the batch itself.
    """
    generator = torch.Generator().manual_seed(seed)
    return [[images, *(_cropped(images, generator) for _ in range(views - 1))] for images in batches]


def _cropped(images: Tensor, generator: torch.Generator) -> Tensor:
    height, width = images.shape[-2:]
    found = []
    for image in images:
        area, down, across, mirrored = torch.rand(4, generator=generator).tolist()
        share = (LEAST_AREA + (1 - LEAST_AREA) * area) ** 0.5
        h, w = max(1, round(height * share)), max(1, round(width * share))
        top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
        crop = image[None, :, top : top + h, left : left + w]
        crop = F.interpolate(crop, (height, width), mode="bicubic", align_corners=False, antialias=True)[0]
        found.append(crop.flip(-1) if mirrored < 0.5 else crop)
    return torch.stack(found)
