"""Logarithmic formats: the exponent is the code. Made for softmax outputs, most of which are tiny."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qhyvit.quantizers.base import Quantizer, check_bits, positive


class Logarithmic(Quantizer):
    """Values s·2^(-k·step) for k = 0..2^bits - 1, and 0.

    k = round(-log2(x / s) / step); where k would reach 2^bits, and for x <= 0, the value is 0. As published, zero has
    no code among the 2^bits: it is masked, and has the code 2^bits here.

    Args:
        scale: () the largest value.
        bits: width of the codes, 2 to 8.

    Raises:
        ValueError: if scale or bits do not fit.
    """

    scale: Tensor
    _values: Tensor

    def __init__(self, scale: Tensor, *, bits: int) -> None:
        super().__init__()
        check_bits(bits)
        self.bits = bits
        self.register_buffer("scale", positive(scale))
        values = self._mantissas() * self.scale.double()
        self.register_buffer("_values", torch.cat([values, values.new_zeros(1)]).to(scale.dtype), persistent=False)

    @property
    def step(self) -> float:
        """Distance of neighbouring exponents, in powers of two."""
        raise NotImplementedError

    @property
    def code_count(self) -> int:
        return (1 << self.bits) + 1

    def _mantissas(self) -> Tensor:
        """Values (2^bits,) for a scale of 1, float64, falling."""
        return torch.exp2(-torch.arange(1 << self.bits, dtype=torch.float64) * self.step)

    def quantize(self, x: Tensor) -> Tensor:
        return self._exponents(x).clamp_(0, 1 << self.bits).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        return self._values[codes.long()]

    def inside(self, x: Tensor) -> Tensor:
        exponents = self._exponents(x)
        return (exponents >= 0) & (exponents < 1 << self.bits)

    def _exponents(self, x: Tensor) -> Tensor:
        ratio = (x.detach().to(self.scale.dtype) / self.scale).clamp_(min=0)
        return torch.round(-torch.log2(ratio) / self.step)  # +inf for 0


class Log2(Logarithmic):
    """Powers of two, the output format of log-int-softmax (FQ-ViT, arXiv 2111.13824)."""

    kind: ClassVar[str] = "log2"

    @property
    def step(self) -> float:
        return 1.0


class LogSqrt2(Logarithmic):
    """Powers of √2, for softmax outputs (RepQ-ViT, arXiv 2212.08254).

    s·2^(-⌈k/2⌉), times √2 for odd k.
    """

    kind: ClassVar[str] = "log-sqrt2"

    @property
    def step(self) -> float:
        return 0.5
