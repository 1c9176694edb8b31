"""Evening out the channels of whole streams before quantization, decided by the errors of the layers that read them.

Cross-layer equalization (arXiv 1906.04721) of a residual stream: every value that additions tie together is scaled and
shifted alike, exactly, in all producers and consumers (`qhyvit.graph.streams`), so nothing remains at run time. What a
stream cannot reach, because an activation function or a norm stands there, is left to `search.balancing`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.calibration.samples import LayerSample
from qhyvit.graph.affine import is_padded
from qhyvit.graph.channels import consumers
from qhyvit.graph.sites import ActivationSite
from qhyvit.graph.streams import UNCHANGED, Stream, find_streams, rescale_streams
from qhyvit.methods.base import Problem
from qhyvit.search.balancing import (
    EXPLICIT_GAIN,
    GAIN,
    Candidate,
    ChangedInput,
    candidates,
    changed_error,
    numbers,
    off_zero,
    operators_help,
)
from qhyvit.search.errors import LayerError
from qhyvit.search.reach import with_room


@dataclass(frozen=True)
class _Reader:
    """A layer that reads one value of a stream: the stream's channel, its share of an offset, extremes, padding."""

    layer: str
    channels: Tensor
    share: Tensor
    low: Tensor
    high: Tensor
    padded: bool


_Read = list[tuple[ActivationSite, list[_Reader]]]


def equalise_streams(problem: Problem, samples: dict[str, Any], errors: dict[str, LayerError]) -> int:
    """Choose and apply; the graph changes, its float output does not.

    Args:
        problem: its graph is rewritten, its sites and statistics are found again.
        samples: by layer name.
        errors: by layer name.

    Returns:
        How many streams were changed.
    """
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    changes = []
    for stream in find_streams(problem.graph, relu=True):
        read = _read(problem, nodes, stream, samples)
        if not read:
            continue
        low, high = _extremes(stream, read)
        paid = stream.past_padding & off_zero(low, high) & operators_help(problem)
        count = sum(numbers(problem.statistics[site.value]) for site, _ in read)
        layers = [(errors[r.layer], r.channels) for _, readers in read for r in readers]
        room = partial(with_room, readers=layers, count=count)
        tried = candidates(low, high, stream.shiftable, room)
        tried += candidates(low, high, stream.shiftable | paid, room)[1:] if bool(paid.any()) else []
        plain = _errors(problem, read, tried[0], errors)
        ratios = [_mean_ratio(_errors(problem, read, c, errors), plain) for c in tried]
        gains = [(EXPLICIT_GAIN if bool(c.offset[paid].any()) else GAIN) * c.believed(count) for c in tried]
        best = min(range(len(tried)), key=lambda i: ratios[i] / gains[i])
        if ratios[best] < gains[best]:
            changes.append((stream, tried[best].factor, tried[best].offset))
    if changes:
        rescale_streams(problem.graph, changes)
        problem.refresh()
    return len(changes)


def _read(problem: Problem, nodes: dict[str, fx.Node], stream: Stream, samples: dict[str, Any]) -> _Read:
    """The quantized values of a stream with the layers that read them, where all of these were sampled."""
    ports = {port.node: port for port in stream.consumers}
    found: _Read = []
    for site in problem.sites.activations:
        statistics = problem.statistics[site.value]
        if site.value not in stream.values or statistics.channel_low is None or statistics.channel_high is None:
            continue
        layers = consumers(problem.graph, nodes[site.value], site.channel_axis, site.readers) or []
        readers = [
            _Reader(
                node.name,
                ports[node.name].channels,
                ports[node.name].share.float(),
                statistics.channel_low.float()[index],
                statistics.channel_high.float()[index],
                is_padded(node),
            )
            for node, index in layers
            if node.name in ports and isinstance(samples.get(node.name), LayerSample)
        ]
        if readers and len(readers) == len(layers):
            found.append((site, readers))
    return found


def _extremes(stream: Stream, read: _Read) -> tuple[Tensor, Tensor]:
    """Extremes of each of the stream's channels over all values read, (K,)."""
    low, high = torch.full((stream.size,), math.inf), torch.full((stream.size,), -math.inf)
    for _, readers in read:
        for r in readers:
            inside = r.channels != UNCHANGED
            low.scatter_reduce_(0, r.channels[inside], r.low[inside], "amin")
            high.scatter_reduce_(0, r.channels[inside], r.high[inside], "amax")
    seen = low <= high
    return torch.where(seen, low, 0.0), torch.where(seen, high, 0.0)


def _errors(problem: Problem, read: _Read, candidate: Candidate, errors: dict[str, LayerError]) -> list[float]:
    t, m = (torch.cat([v, torch.tensor([rest])]) for v, rest in ((candidate.factor, 1.0), (candidate.offset, 0.0)))
    return [
        changed_error(
            problem,
            site,
            [ChangedInput(r.layer, t[r.channels], m[r.channels] * r.share, r.low, r.high, r.padded) for r in readers],
            errors,
        )
        for site, readers in read
    ]


def _mean_ratio(after: list[float], before: list[float]) -> float:
    """Geometric mean of the ratios: every value of the stream counts alike, however large its layers' outputs are."""
    tiny = 1e-30
    return math.exp(sum(math.log((a + tiny) / (b + tiny)) for a, b in zip(after, before, strict=True)) / len(after))
