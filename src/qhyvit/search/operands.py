"""Choosing scale, scheme and granularity of one operand so that the weighted error of a product is least.

E = Σ_n Σ_o g_no² (ô_no - o_no)² on sampled positions (Q-HyViT, arXiv 2303.12557, the objective), with the other operand
as it stands. A choice replaces the incumbent only if its error is strictly lower, so the objective never rises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qhyvit.calibration.samples import LayerSample, ProductSample
from qhyvit.quantizers.uniform import Scheme, UniformAffine, uniform_from_range
from qhyvit.recipe import Granularity
from qhyvit.search.factors import best_factors


@dataclass(frozen=True)
class Space:
    """What the search may choose from.

    Attributes:
        bits, signed: of the codes.
        schemes, granularities: allowed ones.
        one_sided: also shrink each end of an asymmetric range alone (not in the paper).
        coarse: see `best_factors`; 1 is brute force.
    """

    bits: int
    signed: bool
    schemes: tuple[Scheme, ...]
    granularities: tuple[Granularity, ...]
    one_sided: bool = False
    coarse: int = 4


@dataclass
class Range:
    """Extremes of an operand: per tensor, and per channel along an axis of the operand's own layout."""

    low: Tensor
    high: Tensor
    channel_low: Tensor | None = None
    channel_high: Tensor | None = None
    axis: int | None = None


@dataclass
class Choice:
    """A quantizer and its error on the sample, summed."""

    quantizer: UniformAffine
    error: float


Evaluate = Callable[[UniformAffine], Tensor]
"""Errors of a quantizer: (C,) where its channels are separable, else one number."""


def search(space: Space, extremes: Range, evaluate: Evaluate, incumbent: Choice, *, separable: bool) -> Choice:
    """The best quantizer of one operand, or the incumbent.

    Args:
        space: what is allowed.
        extremes: base ranges.
        evaluate: errors of a candidate.
        incumbent: what to beat.
        separable: whether a channel's error depends on that channel's quantizer only.
    """
    best = incumbent
    for granularity in space.granularities:
        low, high, axis = extremes.low, extremes.high, None
        if granularity == "per-channel":
            if extremes.channel_low is None or extremes.channel_high is None:
                continue
            low, high, axis = extremes.channel_low, extremes.channel_high, extremes.axis
        for scheme in space.schemes:
            sides = ("both", "low", "high") if space.one_sided and scheme == "asymmetric" else ("both",)
            found = _walk(space, scheme, sides, (low.float(), high.float()), axis, evaluate, separable)
            if found.error < best.error:
                best = found
    return best


def _walk(
    space: Space,
    scheme: Scheme,
    sides: tuple[str, ...],
    ends: tuple[Tensor, Tensor],
    axis: int | None,
    evaluate: Evaluate,
    separable: bool,
) -> Choice:
    """Shrink both ends of a range together, then each alone from where the last step left the other."""
    base_low, base_high = ends
    low, high = ends
    each = separable and axis is not None
    best: Choice | None = None
    for side in sides:

        def at(factors: Tensor, side: str = side, low: Tensor = low, high: Tensor = high) -> tuple[Tensor, Tensor]:
            f = factors if factors.numel() > 1 else factors.reshape(())
            if side == "low":
                return torch.minimum(f * base_low, high), high
            if side == "high":
                return low, torch.maximum(f * base_high, low)
            return f * base_low, f * base_high

        def build(factors: Tensor, at: Callable[[Tensor], tuple[Tensor, Tensor]] = at) -> UniformAffine:
            bottom, top = at(factors)
            return uniform_from_range(bottom, top, bits=space.bits, scheme=scheme, signed=space.signed, axis=axis)

        def errors(factors: Tensor, build: Callable[[Tensor], UniformAffine] = build) -> Tensor:
            found = evaluate(build(factors))
            return found if each else found.sum().view(1)

        factors, error = best_factors(errors, base_low.numel() if each else 1, coarse=space.coarse)
        total = float(error.sum())
        if best is None or total < best.error:
            best = Choice(build(factors), total)
            low, high = at(factors)
    assert best is not None
    return best


class LayerError:
    """Weighted error of one convolution or linear on its sample.

    Args:
        sample: what to measure on.
        weight: float (C_out, …).
        bias: (C_out,) or None.
        channel_of: input channel of each (group, k), (groups, K), for per-channel activation scales.
    """

    def __init__(self, sample: LayerSample, weight: Tensor, bias: Tensor | None, channel_of: Tensor) -> None:
        self.x = sample.x.transpose(0, 1).contiguous()  # (G, M, K)
        self.weight = weight.view(len(self.x), -1, self.x.shape[2]).transpose(1, 2)  # (G, K, O)
        groups = len(self.x)
        self.shape = weight.shape
        target = sample.y if bias is None else sample.y - bias.view(groups, -1)
        self._target = target.transpose(0, 1).contiguous()  # (G, M, O)
        self._weight = sample.weight.transpose(0, 1).contiguous()
        self._channel_of = channel_of

    def grouped(self, weight: Tensor) -> Tensor:
        """A weight (C_out, …) as (G, K, O)."""
        return weight.view(len(self.x), -1, self.x.shape[2]).transpose(1, 2)

    def quantized_input(self, quantizer: UniformAffine | None) -> Tensor:
        """The sampled inputs through a quantizer, (G, M, K)."""
        if quantizer is None:
            return self.x
        if quantizer.axis is None:
            coded: Tensor = quantizer(self.x)
            return coded
        spread = UniformAffine(
            quantizer.scale[self._channel_of.flatten()],
            quantizer.zero_point[self._channel_of.flatten()],
            bits=quantizer.bits,
            signed=quantizer.signed,
            axis=1,
            scheme=quantizer.scheme,
        )
        groups, m, k = self.x.shape
        flat = self.x.transpose(0, 1).reshape(m, groups * k)
        out: Tensor = spread(flat)
        return out.view(m, groups, k).transpose(0, 1)

    def per_position(self, channels: Tensor) -> Tensor:
        """Values per input channel (C_in,) at every row of the grouped weight, (G, K, 1)."""
        return channels[self._channel_of].unsqueeze(-1)

    def __call__(self, x: Tensor, weight: Tensor, rest: Tensor | None = None) -> Tensor:
        """Errors per output channel (C_out,) of inputs (G, M, K) with weights (G, K, O), `rest` (G, 1, O) added."""
        out = torch.bmm(x, weight)
        if rest is not None:
            out += rest
        return out.sub_(self._target).square_().mul_(self._weight).sum(1).flatten()


def product_error(sample: ProductSample, a: Tensor, b: Tensor) -> Tensor:
    """Weighted error of a matmul of activations, one number."""
    return torch.bmm(a, b).sub_(sample.y).square_().mul_(sample.weight).sum()
