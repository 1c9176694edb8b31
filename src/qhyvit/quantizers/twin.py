"""Twin uniform: one bit chooses between two uniform quantizers (PTQ4ViT, arXiv 2111.12293)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qhyvit.quantizers.base import Quantizer, check_bits, positive


class TwinUniform(Quantizer):
    """Below a split value one step, from it on another. 2^bits codes, half of them for each side.

    Either the one or the other side quantizes a number. (The released code adds the outputs of both, which are both
    non-zero for one number: its error is an order of magnitude larger.)

    With `mirrored`, for functions such as GELU, the lower side is -2^(bits-1)..-1 times its step and the upper one
    0..2^(bits-1) - 1 times its own; the split is 0. Otherwise, for softmax, both sides are 0..2^(bits-1) - 1 times
    their step.

    Codes 0..2^(bits-1) - 1 are the upper side's multiples; the others, less 2^(bits-1), the lower side's (mirrored: the
    magnitude less 1).

    Args:
        lower_step: () step below the split.
        upper_step: () step from the split on.
        split: () where the sides meet; 0 if mirrored.
        bits: width of the codes, 2 to 8.
        mirrored: see above.

    Raises:
        ValueError: if an argument is out of range.
    """

    kind: ClassVar[str] = "twin-uniform"
    fields: ClassVar[tuple[str, ...]] = ("bits", "mirrored")

    lower_step: Tensor
    upper_step: Tensor
    split: Tensor

    def __init__(self, lower_step: Tensor, upper_step: Tensor, split: Tensor, *, bits: int, mirrored: bool) -> None:
        super().__init__()
        check_bits(bits)
        if mirrored and bool(split != 0):
            raise ValueError("a mirrored twin uniform quantizer is split at 0")
        self.bits, self.mirrored = bits, mirrored
        self.register_buffer("upper_step", positive(upper_step))
        self.register_buffer("lower_step", positive(lower_step).to(self.upper_step.dtype))
        self.register_buffer("split", split.to(self.upper_step.dtype))

    def quantize(self, x: Tensor) -> Tensor:
        x = x.detach().to(self.upper_step.dtype)
        half = 1 << (self.bits - 1)
        upper = torch.round(x / self.upper_step).clamp_(0, half - 1)
        if not self.mirrored:
            lower = torch.round(x / self.lower_step).clamp_(0, half - 1)
            return torch.where(x < self.split, lower + half, upper).to(torch.int32)
        magnitude = torch.round(-x / self.lower_step).clamp_(0, half)
        return torch.where(magnitude > 0, magnitude + (half - 1), upper).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        half = 1 << (self.bits - 1)
        whole = codes.to(self.upper_step.dtype)
        lower = (half - 1 - whole) if self.mirrored else (whole - half)
        return torch.where(codes >= half, lower * self.lower_step, whole * self.upper_step)

    def inside(self, x: Tensor) -> Tensor:
        half = 1 << (self.bits - 1)
        upper = torch.round(x.detach() / self.upper_step)
        lower = torch.round(x.detach() / self.lower_step)
        fits = (lower >= -half) if self.mirrored else ((lower >= 0) & (lower < half))
        return torch.where(x.detach() < self.split, fits, (upper >= 0) & (upper < half))


def twin_for_probabilities(split: float, *, bits: int, top: float = 1.0) -> TwinUniform:
    """For softmax outputs in 0..top: steps split / (2^(bits-1) - 1) and top / (2^(bits-1) - 1)."""
    count = (1 << (bits - 1)) - 1
    lower, upper, at = torch.tensor([split / count, top / count, split])
    return TwinUniform(lower, upper, at, bits=bits, mirrored=False)


def twin_for_activation(step: Tensor, lowest: float, *, bits: int) -> TwinUniform:
    """For a function with minimum `lowest` < 0: its negative step is |lowest| / 2^(bits-1), `step` () the other."""
    lower = torch.tensor(-lowest / (1 << (bits - 1)))
    return TwinUniform(lower, step, torch.zeros(()), bits=bits, mirrored=True)
