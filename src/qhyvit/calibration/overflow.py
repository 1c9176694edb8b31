"""Zero points that overflow: channels, or whole tensors, whose range lies off 0 (Q-HyViT, challenge 2).

An integer zero point inside the codes exists if and only if the range comes within half a step of 0. For a channel with
positive values only a per-channel quantizer therefore has to waste codes on the gap below (range widened to hold 0), or
to saturate (zero point clamped). The way out that costs nothing is to move the offset into the next layer's bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qhyvit.methods.base import Problem
from qhyvit.quantizers.uniform import overflows


@dataclass(frozen=True)
class Overflow:
    """One activation with overflowing zero points.

    Attributes:
        value: name of the site.
        module: dotted module name.
        channels: how many there are.
        overflowing: how many of them have a zero point outside the codes.
        tensor: whether the whole tensor has.
    """

    value: str
    module: str
    channels: int
    overflowing: int
    tensor: bool


@dataclass(frozen=True)
class Overflows:
    """All of one net, in graph order; values without overflow are left out."""

    sites: tuple[Overflow, ...]

    def channels(self) -> int:
        """Overflowing channels in all."""
        return sum(s.overflowing for s in self.sites)

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON-able."""
        return [vars(s) for s in self.sites]

    def notes(self, after: Overflows | None) -> list[str]:
        """A sentence for the report; `after` are those that remain once channels were shifted."""
        if not self.sites:
            return []
        said = f"zero points of {self.channels()} channels in {len(self.sites)} values overflow"
        if after is not None:
            said += f"; {after.channels()} after offsets were folded into biases"
        return [said]


def count_overflows(problem: Problem) -> Overflows:
    """Find overflowing zero points from the statistics of the calibration pictures (with channels)."""
    found = []
    for site in problem.sites.activations:
        statistics = problem.statistics[site.value]
        if statistics.channel_low is None or statistics.channel_high is None:
            continue
        bits = problem.bits(site).activation_bits
        mask = overflows(statistics.channel_low, statistics.channel_high, bits)
        whole = bool(overflows(statistics.low, statistics.high, bits))
        if bool(mask.any()):
            found.append(Overflow(site.value, site.module, mask.numel(), int(mask.sum()), whole))
    return Overflows(tuple(found))
