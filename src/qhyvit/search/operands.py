"""Choosing scale, scheme and granularity of one operand so that an error is least.

A choice replaces the incumbent only if its error is strictly lower, so the objective never rises (Q-HyViT, arXiv
2303.12557, the search of one operand with the other as it stands).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qhyvit.quantizers.uniform import Scheme, UniformAffine, Zero, uniform_from_range
from qhyvit.recipe import Granularity
from qhyvit.search.candidates import Candidates
from qhyvit.search.factors import FACTORS, best_factors

# Multiply-adds (a few milliseconds) that all candidates of a range may cost before some are left out.
BUDGET = 1 << 25
# Around the incumbent, once the whole grid has been searched: its range times these.
LOCAL = torch.tensor([0.8, 0.88, 0.94, 0.97, 1.02, 1.05, 1.1, 1.18])


@dataclass(frozen=True)
class Space:
    """What the search may choose from.

    Attributes:
        bits, signed: of the codes.
        schemes, granularities: allowed ones.
        zero: what becomes of ranges without 0, see `affine_parameters`.
        one_sided: also shrink each end of an asymmetric range alone (not in the paper).
        coarse: try at most every so many candidates first (see `best_factors`); 1 is brute force.
        factors: the candidates on the base range.
    """

    bits: int
    signed: bool
    schemes: tuple[Scheme, ...]
    granularities: tuple[Granularity, ...]
    zero: Zero = "extend"
    one_sided: bool = False
    coarse: int = 4
    factors: Tensor = field(default=FACTORS, compare=False)

    def step(self, cost: int) -> int:
        """Every how many candidates are tried first, if one costs so many multiply-adds."""
        return next((c for c in range(1, self.coarse) if cost * len(self.factors) <= c * BUDGET), self.coarse)


@dataclass
class Range:
    """Extremes of an operand: per tensor (), and per channel (C,) along an axis of the operand's own layout."""

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


Evaluate = Callable[[Candidates], Tensor]
"""Errors of B candidates: (B, C) where the operand's channels are separable, else (B, 1) or (B, anything) to sum."""


def search(
    space: Space,
    extremes: Range,
    evaluate: Evaluate,
    incumbent: Choice,
    *,
    separable: bool,
    cost: int = 1 << 62,
    again: bool = False,
) -> Choice:
    """The best quantizer of one operand, or the incumbent.

    Args:
        space: what is allowed.
        extremes: base ranges.
        evaluate: errors of candidates.
        incumbent: what to beat.
        separable: whether a channel's error depends on that channel's quantizer only.
        cost: multiply-adds that one candidate costs.
        again: the whole space was searched before: only look around the incumbent, or coarsely where that is cheap.
    """
    best, coarse = incumbent, space.step(cost)
    local = again and coarse > 1
    if again:
        coarse = space.coarse
    for scheme, base, axis, factors in _starts(space, extremes, incumbent, local):
        each = separable and axis is not None
        walk = _Walk(space, scheme, axis, evaluate, each, factors, 1 if local else coarse)
        found = walk.run(*base)
        if found.error < best.error:
            best = found
    return best


def _starts(
    space: Space, extremes: Range, incumbent: Choice, local: bool
) -> Iterator[tuple[Scheme, tuple[Tensor, Tensor], int | None, Tensor]]:
    if local:
        q = incumbent.quantizer
        step, zero = q.scale.float(), q.zero_point.float()
        ends = ((q.quant_min - zero) * step, (q.quant_max - zero) * step)
        if q.scheme == "symmetric":  # the base of a symmetric scale is half a step below the outermost code
            ends = (-step * (2 ** (q.bits - 1) - 0.5), step * (2 ** (q.bits - 1) - 0.5))
        yield q.scheme, ends, q.axis, LOCAL
        return
    for granularity in space.granularities:
        low, high, axis = extremes.low, extremes.high, None
        if granularity == "per-channel":
            if extremes.channel_low is None or extremes.channel_high is None:
                continue
            low, high, axis = extremes.channel_low, extremes.channel_high, extremes.axis
        for scheme in space.schemes:
            if scheme == "symmetric" and space.one_sided and "asymmetric" in space.schemes and _is_skewed(low, high):
                continue
            yield scheme, (low.float(), high.float()), axis, space.factors


def _is_skewed(low: Tensor, high: Tensor) -> bool:
    """Whether every range reaches twice as far to one side as to the other, or further.

    What is clipped alike at the far end then has steps at least a quarter shorter without symmetry.
    """
    ends = torch.stack((low.clamp_max(0).abs(), high.clamp_min(0)))
    return bool((2 * ends.amin(0) <= ends.amax(0)).all())


@dataclass(frozen=True)
class _Walk:
    """Shrinks both ends of a range together, then each alone from where the last step left the other."""

    space: Space
    scheme: Scheme
    axis: int | None
    evaluate: Evaluate
    each: bool
    factors: Tensor
    coarse: int

    def run(self, low: Tensor, high: Tensor) -> Choice:
        base = (low, high)
        sides = ["both"]
        if self.space.one_sided and self.scheme == "asymmetric":  # an end at 0 stays where it is
            sides += [side for side, end in zip(("low", "high"), base, strict=True) if bool(end.any())]
        ends, best = base, None
        for side in sides:
            found, moved = self._side(side, base, ends)
            if best is None or found.error < best.error:
                best, ends = found, moved
        assert best is not None
        return best

    def _side(
        self, side: str, base: tuple[Tensor, Tensor], ends: tuple[Tensor, Tensor]
    ) -> tuple[Choice, tuple[Tensor, Tensor]]:
        channels = base[0].numel()

        def at(f: Tensor) -> tuple[Tensor, Tensor]:
            if side == "low":
                return torch.minimum(f * base[0], ends[1]), ends[1].expand(f.shape[0], channels)
            if side == "high":
                return ends[0].expand(f.shape[0], channels), torch.maximum(f * base[1], ends[0])
            return f * base[0], f * base[1]

        def errors(f: Tensor) -> Tensor:
            ranges = at(f.to(base[0].device))
            found = self.evaluate(Candidates.from_ranges(*ranges, scheme=self.scheme, **self._kind()))
            return found if self.each else found.sum(1, keepdim=True)

        factors, error = best_factors(
            errors,
            channels if self.each else 1,
            factors=self.factors,
            coarse=self.coarse,
        )
        low, high = (end.reshape(base[0].shape) for end in at(factors[None].to(base[0].device)))
        quantizer = uniform_from_range(low, high, scheme=self.scheme, axis=self.axis, **self._kind())
        return Choice(quantizer, float(error.sum())), (low, high)

    def _kind(self) -> dict[str, Any]:
        return {"bits": self.space.bits, "signed": self.space.signed, "zero": self.space.zero}
