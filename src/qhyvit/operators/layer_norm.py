"""LayerNorm on codes whose channels share one scale but for powers of two (FQ-ViT, arXiv 2111.13824)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qhyvit.operators.base import IntegerOperator

MULTIPLIER_BITS = 8


class IntegerLayerNorm(IntegerOperator):
    """LayerNorm over the last axis, its output in units of the next quantizer's scale.

    With x_q = (q - z)·2^(k_c): μ and σ come from sums of x_q and x_q²; the output's factor is A = γ·s_0 / (σ·s_out) and
    is applied as an 8-bit multiplier M and a shift N. (The published form has no ε; here it enters σ², as in the float
    norm.)

    Args:
        scale: () s_0, of the shifted input codes.
        weight: (C,) γ.
        bias: (C,) β.
        output_scale: () of the output's codes.
        eps: as in the float norm.
    """

    kind: ClassVar[str] = "integer-layer-norm"
    fields: ClassVar[tuple[str, ...]] = ("eps",)

    scale: Tensor
    weight: Tensor
    bias: Tensor
    output_scale: Tensor

    def __init__(self, scale: Tensor, weight: Tensor, bias: Tensor, output_scale: Tensor, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("scale", scale), ("weight", weight), ("bias", bias), ("output_scale", output_scale)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Values (…, C) of the output's codes, not yet clipped to them."""
        scale, out = self.scale.double(), self.output_scale.double()
        codes = torch.round(x.double() / scale)
        count = codes.shape[-1]
        total = codes.sum(-1, keepdim=True)
        mean = total / count * scale
        variance = (count * codes.square().sum(-1, keepdim=True) - total.square()) * (scale / count).square()
        deviation = torch.sqrt(variance + self.eps)
        gamma, beta = self.weight.double(), self.bias.double()
        factor = scale / deviation * gamma / out
        offset = (beta - mean / deviation * gamma) / out
        magnitude = factor.abs().clamp(min=torch.finfo(torch.float32).tiny)
        shift = (MULTIPLIER_BITS - 1 - torch.floor(torch.log2(magnitude))).clamp_(0, 31)
        multiplier = torch.floor(torch.ldexp(factor.abs(), shift)).clamp_(0, (1 << MULTIPLIER_BITS) - 1)
        whole = torch.sign(factor) * multiplier * codes + torch.round(torch.ldexp(offset, shift))
        return (out * torch.round(torch.ldexp(whole, -shift))).to(x.dtype)
