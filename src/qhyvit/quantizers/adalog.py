"""A logarithm whose base adapts to the tensor: 2^(q/37) (AdaLog, arXiv 2407.12951)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qhyvit.quantizers.log import Logarithmic

DENOMINATOR = 37
NUMERATORS = range(10, 139)  # 37 is log2; 18 and 19 lie on either side of log √2


class AdaLog(Logarithmic):
    """Values s·2^(-k·q/37) - shift for k = 0..2^bits - 1, and -shift where k would reach 2^bits.

    The power is a shift by ⌊k·q/37⌋ and a factor from a table of 2^bits entries, round(2^(-(k·q mod 37)/37)·D)/D with
    D = 2^(bits+1) - 2: what is simulated is what such a kernel computes.

    Args:
        scale: () the largest value, after the shift.
        bits: width of the codes, 2 to 8.
        q: numerator of the exponent of the base, 10 to 138.
        shift: added before, subtracted after; makes one-sided functions such as GELU non-negative. (A kernel leaves it
            to the next bias: b - shift·ΣW.)

    Raises:
        ValueError: if an argument is out of range.
    """

    kind: ClassVar[str] = "adalog"
    fields: ClassVar[tuple[str, ...]] = ("bits", "q", "shift")

    def __init__(self, scale: Tensor, *, bits: int, q: int, shift: float = 0.0) -> None:
        if q not in NUMERATORS:
            raise ValueError(f"q must be an integer of 10 to 138, not {q}")
        self.q, self.shift = q, float(shift)
        super().__init__(scale, bits=bits)
        self._values -= self.shift

    @property
    def step(self) -> float:
        return self.q / DENOMINATOR

    def _mantissas(self) -> Tensor:
        product = torch.arange(1 << self.bits) * self.q
        whole = (1 << (self.bits + 1)) - 2
        factors = torch.round(torch.exp2(-(product % DENOMINATOR).double() / DENOMINATOR) * whole) / whole
        return torch.ldexp(factors, -(product // DENOMINATOR))

    def _exponents(self, x: Tensor) -> Tensor:
        return super()._exponents(x.detach().to(self.scale.dtype) + self.shift)
