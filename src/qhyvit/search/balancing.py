"""Which values to shift and scale by channel before quantization, decided by the weighted error of the layers behind.

On a runtime with one scale per activation tensor this is the per-channel granularity of Q-HyViT's search in a form
that can be shipped: see `qhyvit.graph.balance`. The factors are t_c = (R_c / max R)^α of the channels' ranges R_c;
α = 1 evens all channels out, smaller ones leave part of the difference to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.calibration.samples import LayerSample
from qhyvit.calibration.statistics import TensorStatistics
from qhyvit.graph.affine import is_padded
from qhyvit.graph.balance import Passage, balance, foldable, passage, shiftable
from qhyvit.graph.channels import consumers
from qhyvit.graph.ops import WEIGHTED, is_call
from qhyvit.graph.sites import ActivationSite
from qhyvit.methods.base import Problem
from qhyvit.quantizers.uniform import uniform_from_range
from qhyvit.search.candidates import Candidates
from qhyvit.search.errors import InputError, LayerError
from qhyvit.search.factors import HOPELESS
from qhyvit.search.reach import belief, with_room

EXPONENTS = (0.25, 0.5, 0.75, 1.0)
SHRINK = torch.tensor((1.0, 0.85, 0.7, 0.55, 0.4))
# The error must fall to this share. Ranges of single channels are estimated from fewer numbers than the tensor's, so a
# small gain on the calibration pictures is none on others.
GAIN = 0.5
EXPLICIT_GAIN = 0.25  # where the change stays as an operator of its own, which also costs time


@dataclass(frozen=True)
class Candidate:
    """Channel factors t and offsets m of one value, (C,) each."""

    factor: Tensor
    offset: Tensor

    def believed(self, count: float) -> float:
        """The part of `GAIN` that the error must fall to, of `count` numbers a channel: evened by few they clip others.

        A shift alone is believed: all channels keep the reach of the widest.
        """
        return 1.0 if bool((self.factor == 1).all()) else belief(count)


def candidates(
    low: Tensor, high: Tensor, shiftable: Tensor, room: Callable[[Tensor], Tensor] = lambda reach: reach
) -> list[Candidate]:
    """No change first, then all exponents, without a shift and with one of the `shiftable` channels to their middle.

    Args:
        low: smallest value of each channel (C,).
        high: likewise the largest.
        shiftable: which channels an offset may move, bool (C,).
        room: makes the reaches of channels those that they are evened out by.
    """
    zero, one = torch.zeros_like(low), torch.ones_like(low)
    found = [Candidate(one, zero)]
    for shift in (False, True) if bool(shiftable.any()) else (False,):
        offset = torch.where(shiftable, (low + high) / 2, 0.0) if shift else zero
        reach = room(torch.maximum((low - offset).abs(), (high - offset).abs()))
        ratio = reach / reach.max().clamp_min(torch.finfo(low.dtype).tiny)
        ratio = torch.where(ratio > 0, ratio, one)
        found += [Candidate(ratio**alpha, offset) for alpha in EXPONENTS]
        if shift:
            found.append(Candidate(one, offset))
    return found


def balance_all(problem: Problem, samples: dict[str, Any], errors: dict[str, LayerError]) -> list[str]:
    """Choose and apply; the graph changes, its float output does not.

    Args:
        problem: its graph is rewritten, its sites and statistics are found again.
        samples: by layer name.
        errors: by layer name.

    Returns:
        Names of the values that were changed.
    """
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    changed = []
    for site in reversed(problem.sites.activations):  # an offset past padding changes who reads the layer behind it
        for_layers = _read_by_layers(problem, nodes[site.value], site, samples)
        layers = consumers(problem.graph, nodes[site.value], site.channel_axis, for_layers.readers)
        if not layers:
            continue
        chosen = _choose(problem, for_layers, layers, errors)
        if chosen is not None:
            at = nodes[site.value], site.channel_axis, for_layers.readers
            balance(problem.graph, *at, chosen.factor, chosen.offset, _beside(problem, *at))
            changed.append(site.value)
    if changed:
        problem.refresh()
    return changed


def _read_by_layers(problem: Problem, node: fx.Node, site: ActivationSite, samples: dict[str, Any]) -> ActivationSite:
    """The site with those of its readers that lead to sampled layers alone; others, like products, keep the value.

    They keep it as codes: so nothing is changed for some readers of a layer's output, whose codes targets want anyway.
    """
    found = []
    for reader in site.readers:
        layers = consumers(problem.graph, node, site.channel_axis, [reader])
        if layers and all(isinstance(samples.get(n.name), LayerSample) for n, _ in layers):
            found.append(reader)
    if len(found) < len(site.readers) and is_call(node, WEIGHTED):
        found = []
    return replace(site, readers=tuple(found))


def _choose(
    problem: Problem, site: ActivationSite, layers: list[tuple[fx.Node, Tensor]], errors: dict[str, LayerError]
) -> Candidate | None:
    statistics = problem.statistics[site.value]
    if statistics.channel_low is None or statistics.channel_high is None:
        return None
    node = next(n for n in problem.graph.graph.nodes if n.name == site.value)
    low, high = statistics.channel_low.float(), statistics.channel_high.float()
    free = shiftable(problem.graph, node, site.channel_axis, site.readers)
    beside = _beside(problem, node, site.channel_axis, site.readers)
    folds = foldable(problem.graph, node, site.channel_axis, [*site.readers, *beside.readers])
    if not folds and not operators_help(problem):
        return None
    shifts = torch.ones_like(low).bool() if free else off_zero(low, high) & operators_help(problem)
    room = partial(with_room, readers=[(errors[n.name], index) for n, index in layers], count=numbers(statistics))
    tried = [c for c in candidates(low, high, shifts, room) if not beside or bool((c.factor == 1).all())]
    found = [changed_error(problem, site, [_changed(c, low, high, *at) for at in layers], errors) for c in tried]
    gains = [
        c.believed(numbers(statistics)) * (GAIN if folds and (free or not bool(c.offset.any())) else EXPLICIT_GAIN)
        for c in tried
    ]
    best = min(range(len(tried)), key=lambda i: found[i] / gains[i])
    return tried[best] if found[best] < gains[best] * found[0] else None


def _beside(problem: Problem, node: fx.Node, axis: int, readers: Collection[str]) -> Passage:
    """What may read a shifted value beside layers, where it would read its codes; else it reads it as it was."""
    return Passage() if operators_help(problem) else passage(problem.graph, node, axis, readers)


def numbers(statistics: TensorStatistics) -> float:
    """How many numbers of each channel were seen."""
    assert statistics.channel_low is not None
    return statistics.count / len(statistics.channel_low)


def operators_help(problem: Problem) -> bool:
    """Whether a change may leave an operator behind: in full scope that reads the value as coded before the change."""
    return problem.recipe.scope == "partial"


def off_zero(low: Tensor, high: Tensor) -> Tensor:
    """Channels whose range does not hold 0: their zero points overflow. Before padding only these are shifted."""
    return (low > 0) | (high < 0)


@dataclass(frozen=True)
class ChangedInput:
    """A layer whose input channels would be shifted and scaled.

    Attributes:
        layer: its node name.
        factor, offset: t and m of each input channel, (C_in,).
        low, high: extremes of each input channel before the change, (C_in,).
        padded: whether the layer pads with zeros; then channels that are shifted hold no other zeros (`off_zero`).
    """

    layer: str
    factor: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    padded: bool


def _changed(candidate: Candidate, low: Tensor, high: Tensor, layer: fx.Node, index: Tensor) -> ChangedInput:
    t, m = candidate.factor[index], candidate.offset[index]
    return ChangedInput(layer.name, t, m, low[index], high[index], is_padded(layer))


def least_error(errors: list[InputError], low: Tensor, high: Tensor, bits: int) -> float:
    """Summed error of some layers with the best of a few clipped ranges of their input, widest first.

    Args:
        errors: of the layers, all of which read the value.
        low: its smallest value () or that of each input channel (C_in,).
        high: likewise the largest.
        bits: of its codes.
    """
    ranges = (end.float() * SHRINK.to(end.device).view(-1, 1) for end in (low, high))
    least = math.inf
    for one in Candidates.from_ranges(*ranges, bits=bits, signed=False, scheme="asymmetric").split(1):
        found = sum(float(error(one)) for error in errors)
        least = min(least, found)
        if found > HOPELESS * least:
            break
    return least


def changed_error(
    problem: Problem, site: ActivationSite, layers: list[ChangedInput], errors: dict[str, LayerError]
) -> float:
    """Summed error of the layers that read a value, with the best of a few ranges for the changed value."""
    asked = problem.bits(site)
    bottom = min(((c.low - c.offset) / c.factor).min() for c in layers)
    top = max(((c.high - c.offset) / c.factor).max() for c in layers)
    found = []
    for change in layers:
        error = errors[change.layer]
        t, m = error.per_position(change.factor), error.per_position(change.offset).transpose(1, 2)
        if change.padded and bool(m.any()):
            m = torch.where(error.x == 0, 0.0, m)  # padding stays 0, and what the bias holds too much there is undone
        weight = error.weight * t
        axis_low, axis_high = weight.amin(1), weight.amax(1)  # over K; (G, O)
        quantizer = uniform_from_range(
            axis_low.flatten(), axis_high.flatten(), bits=asked.weight_bits, scheme="symmetric", signed=True, axis=0
        )
        rows = weight.transpose(1, 2)
        coded = quantizer(rows.flatten(0, 1)).view(rows.shape).transpose(1, 2)
        moved = error.reading((error.x - m) / t.transpose(1, 2), torch.bmm(m, error.weight))
        found.append(InputError(moved, coded))
    return least_error(found, bottom, top, asked.activation_bits)
