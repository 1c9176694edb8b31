"""Shift-uniform-log2: a uniform quantizer on -log2(x + η) (I&S-ViT, arXiv 2311.10126)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qhyvit.quantizers.base import Quantizer, check_bits, positive


class ShiftUniformLog2(Quantizer):
    """Values 2^round(-s·(code - z)) - η for 2^bits codes.

    The code is clip(round(-log2(x + η) / s) + z, 0, 2^bits - 1); exponents are whole, so that a kernel shifts. (The
    released code clips to 2^bits, one level too many.)

    Args:
        scale: () step s of the exponents.
        zero_point: () z, an integer, not necessarily one of the codes.
        eta: () η > 0, which bounds the logarithm.
        bits: width of the codes, 2 to 8.

    Raises:
        ValueError: if an argument is out of range.
    """

    kind: ClassVar[str] = "sulq"

    scale: Tensor
    zero_point: Tensor
    eta: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, eta: Tensor, *, bits: int) -> None:
        super().__init__()
        check_bits(bits)
        self.bits = bits
        self.register_buffer("scale", positive(scale))
        self.register_buffer("zero_point", zero_point.to(torch.int32))
        self.register_buffer("eta", positive(eta).to(self.scale.dtype))

    def quantize(self, x: Tensor) -> Tensor:
        return self._unclamped(x).clamp_(0, (1 << self.bits) - 1).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        exponents = torch.round((codes - self.zero_point).to(self.scale.dtype) * -self.scale)
        return torch.ldexp(torch.ones_like(exponents), exponents) - self.eta

    def inside(self, x: Tensor) -> Tensor:
        codes = self._unclamped(x)
        return (codes >= 0) & (codes < 1 << self.bits)

    def _unclamped(self, x: Tensor) -> Tensor:
        shifted = (x.detach().to(self.scale.dtype) + self.eta).clamp_(min=torch.finfo(self.scale.dtype).tiny)
        return torch.round(-torch.log2(shifted) / self.scale) + self.zero_point


def sulq_from_range(low: Tensor, high: Tensor, eta: float, *, bits: int) -> ShiftUniformLog2:
    """The quantizer whose codes cover low..high, () each, low > -η.

    s = (y_max - y_min) / (2^bits - 1), z = -round(y_min / s), y = -log2(x + η).
    """
    dtype = torch.float64 if low.dtype == torch.float64 else torch.float32
    top, bottom = (-torch.log2(end.double() + eta) for end in (low, high))
    scale = ((top - bottom) / ((1 << bits) - 1)).clamp(min=torch.finfo(torch.float32).eps)
    zero_point = -torch.round(bottom / scale)
    return ShiftUniformLog2(scale.to(dtype), zero_point, torch.tensor(eta, dtype=dtype), bits=bits)
