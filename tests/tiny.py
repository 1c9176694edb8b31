"""A net that quantizes in seconds and has what the large ones have: convolutions, attention, a linear head."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qhyvit.pipeline import quantize
from qhyvit.quantized import QuantizedModel
from quick import ranges_only

SIDE, CLASSES = 16, 7


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.stem = nn.Conv2d(3, 16, 3, 2, 1)
            self.norm = nn.BatchNorm2d(16)
            self.depthwise = nn.Conv2d(16, 16, 3, 2, 1, groups=16)
            self.qkv = nn.Linear(16, 48)
            self.place = nn.Parameter(torch.randn(1, 16, 16))
            self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.stem(x)))
        x = self.depthwise(x).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.head(x.mean(1))
        return out


_SCRATCH = TemporaryDirectory(prefix="qhyvit-tests-")  # removed when Python ends


def fresh(**changes: Any) -> QuantizedModel:
    """Quantized anew, always in the same way."""
    return quantize(Tiny(), calib=calibration(), input_size=SIDE, **ranges_only(changes))


@cache
def calibration() -> Path:
    """16 pictures to calibrate with."""
    return pictures(Path(_SCRATCH.name) / "calibration.npz", 16)


@cache
def quantized() -> QuantizedModel:
    """Shared between tests, which must not change it."""
    return fresh(bias_correction=True)


def pictures(path: Path, count: int = 24, labels: bool = False) -> Path:
    """An array file of noise pictures, labelled 0, 1, 2, … in turn."""
    rng = np.random.default_rng(9)
    arrays = {"images": rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)}
    if labels:
        arrays["labels"] = np.arange(count) % CLASSES
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path
