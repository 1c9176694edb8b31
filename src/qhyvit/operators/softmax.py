"""Softmax in integers, with power-of-two outputs: log-int-softmax and its linear form.

Scores are integers in units of the input's scale s, the row maximum taken off. exp(x) = 2^-q·exp(r) with r in
(-ln 2, 0]; exp(r) is a polynomial in integers (FQ-ViT, arXiv 2111.13824, after I-BERT) or a line (HyQ, IJCAI 2024). The
sum over a row divided by an element is 1 / probability; its rounded logarithm is the code.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qhyvit.operators.base import IntegerOperator
from qhyvit.quantizers.base import check_bits, positive

Exponential = Literal["polynomial", "linear"]
LARGEST_SHIFT = 30
# exp(r) ≈ a·r² + b·r + c on (-ln 2, 0]; only the ratios b / a and c / a enter
A, B, C = 0.35815147, 0.96963238, 1.0
# exp(r) / 8 ≈ slope·(r + LINE); the slope cancels in the ratio
LINE = 1.35472


class IntegerSoftmax(IntegerOperator):
    """Probabilities as powers of two: 2^-code, 0 where the exponent reaches 2^bits.

    Args:
        scale: () of the scores' codes; their zero point cancels.
        bits: width of the output codes, 2 to 8.
        axis: over which it sums.
        exponential: "polynomial" of second order (FQ-ViT), or "linear" (HyQ).

    Raises:
        ValueError: if an argument is out of range.
    """

    kind: ClassVar[str] = "integer-softmax"
    fields: ClassVar[tuple[str, ...]] = ("bits", "axis", "exponential")

    scale: Tensor

    def __init__(self, scale: Tensor, *, bits: int, axis: int, exponential: Exponential) -> None:
        super().__init__()
        check_bits(bits)
        if exponential not in ("polynomial", "linear"):
            raise ValueError(f"exponential is {exponential!r}, allowed: polynomial, linear")
        self.bits, self.axis, self.exponential = bits, axis, exponential
        self.register_buffer("scale", positive(scale))

    def exponentials(self, scores: Tensor) -> Tensor:
        """Integers ∝ exp(score·s) of integer `scores` <= 0, float64."""
        scale = float(self.scale)
        ln2 = math.floor(-math.log(2) / scale)  # < 0
        scores = scores.double().clamp(min=LARGEST_SHIFT * ln2)
        shift = torch.floor(scores / ln2)
        rest = scores - shift * ln2
        if self.exponential == "linear":
            e = rest + max(math.floor(LINE / scale), 1)  # at a coarse scale 0 would leave rows of zeros
        else:
            e = (rest + math.floor(B / A / scale)) * rest + max(math.floor(C / A / scale**2), 1)
        return torch.floor(torch.ldexp(e, LARGEST_SHIFT - shift)).clamp_(min=0)

    def exponents(self, x: Tensor) -> Tensor:
        """k with probability ≈ 2^-k, not clipped, float64; +inf where the exponential is 0."""
        scores = torch.round(x.double() / self.scale.double())
        e = self.exponentials(scores - scores.amax(self.axis, keepdim=True))
        inverse = torch.round(e.sum(self.axis, keepdim=True) / e)
        k = torch.floor(torch.log2(inverse))
        power = torch.exp2(k)
        return torch.where(inverse - power >= power / 2, k + 1, k)

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities of fake-quantized scores, any shape."""
        k = self.exponents(x)
        return torch.where(k >= 1 << self.bits, 0.0, torch.exp2(-k)).to(x.dtype)
