"""What all number formats have in common: codes and back, and fake quantization."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from qhyvit.stored import Stored

WIDEST = 8  # bits of the formats that are not uniform


class Quantizer(Stored):
    """A number format with its parameters.

    A format implements `quantize`, `dequantize` and `inside`.

    Attributes:
        executable: whether integer runtimes have the format (a target may still want one scale per tensor).
        bits: width of the codes.
        axis: the channel axis of formats with parameters per channel; None: one set for the whole tensor.
    """

    fields: ClassVar[tuple[str, ...]] = ("bits",)
    executable: ClassVar[bool] = False

    bits: int
    axis: int | None = None

    @property
    def code_count(self) -> int:
        """Codes run from 0 to this number minus one, in formats other than the uniform ones."""
        return 1 << self.bits

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of `x` (any shape, floating point): int32, the same shape. No gradient."""
        raise NotImplementedError

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of integer `codes` (any shape): floating point, the same shape."""
        raise NotImplementedError

    def inside(self, x: Tensor) -> Tensor:
        """Where `x` was rounded rather than clipped, bool: there the gradient passes."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization: `dequantize(quantize(x))`; the gradient is straight-through where `inside`."""
        with torch.no_grad():
            values = self.dequantize(self.quantize(x))
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _StraightThrough.apply(x.to(values.dtype), values, self.inside(x))  # type: ignore[no-untyped-call]
            return out
        return values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


def check_bits(bits: int, lowest: int = 2, highest: int = WIDEST) -> None:
    """ValueError unless a format exists in this width."""
    if not lowest <= bits <= highest:
        raise ValueError(f"this format has {lowest} to {highest} bits, not {bits}")


def positive(scale: Tensor) -> Tensor:
    """A scale () as it is kept: float64 if it was, else float32.

    Raises:
        ValueError: unless it is one number, positive and finite.
    """
    if scale.ndim or not bool(scale.isfinite() & (scale > 0)):
        raise ValueError(f"the scale must be one positive finite number, not {scale}")
    return scale if scale.dtype == torch.float64 else scale.float()
