"""Streams: values whose channels can only be scaled or shifted together, found and rewritten exactly.

A residual stream between convolution blocks has several producers, joined by additions, and several consumers. Scaling
one of its channels means scaling that channel in all producers and undoing it in all consumers; then the float output
stays what it was. (Cross-layer equalization, arXiv 1906.04721, of whole streams; with offsets, which may enter at one
producer and leave at a later one, as channel shifting in Outlier Suppression+, arXiv 2304.09145.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qhyvit.graph.ops import add_constant, argument, constant, is_call, set_weight, tidy, weight_of
from qhyvit.graph.stream_offsets import arrivals, entering
from qhyvit.graph.tracing import NORMS, End, Trace
from qhyvit.graph.tracing_rules import FIXED, unspread
from qhyvit.graph.undoing import undo

UNCHANGED = -1


@dataclass(frozen=True)
class Port:
    """A producer or consumer of a stream.

    Attributes:
        node: name of the graph node: a layer or norm, as a producer also a constant.
        channels: the stream's channel behind each output channel of a producer (a constant: behind each number, in its
            shape) or input channel of a consumer, int64 (C,); -1 where it is none of the stream's.
        share: how much of its channel's offset arrives there, float64 in the shape of `channels`.
    """

    node: str
    channels: Tensor
    share: Tensor


@dataclass(frozen=True)
class Stream:
    """Values tied together by the operators between their producers and their consumers.

    Attributes:
        values: names of the nodes, in graph order.
        producers, consumers: in graph order.
        size: number of channels, K.
        shiftable: bool (K,): whether an offset of the channel reaches a consumer at no cost, never into zero padding.
        past_padding: bool (K,): whether one does that meets zero padding, where an addition remains (`undoing.undo`).
    """

    values: tuple[str, ...]
    producers: tuple[Port, ...]
    consumers: tuple[Port, ...]
    size: int
    shiftable: Tensor
    past_padding: Tensor


def find_streams(graph: fx.GraphModule, *, relu: bool = False) -> list[Stream]:
    """All streams that can be rescaled.

    Followed are layout operators, additions, concatenations, means and pools, interpolation, and products with gates,
    constants or attention weights. A channel that anything else reads (an activation function, a norm, the output)
    belongs to no stream.

    Args:
        graph: a captured graph, which is not changed.
        relu: follow channels through ReLU too, which commutes with positive factors.

    Returns:
        In graph order of their first producers.
    """
    trace = Trace(graph, relu=relu)
    roots = trace.roots()
    values = _channels(trace, roots, graph)
    groups = _Groups()
    for node, step in trace.steps.items():
        for source, _ in step.sources:
            if values[node] & values.get(source, set()):
                groups.join(node, source)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, held in values.items():
        if held:
            members.setdefault(groups.find(node), []).append(node)
    found = (_stream(trace, roots, values, nodes) for nodes in members.values())
    return [stream for stream in found if stream is not None]


def rescale_stream(graph: fx.GraphModule, stream: Stream, factor: Tensor, offset: Tensor | None = None) -> None:
    """Rewrite producers and consumers so that the stream carries (value - share · offset) / factor.

    Args:
        graph: the graph in which the stream was found; changed in place, its float output stays the same.
        stream: one of `find_streams`; the others stay valid unless an offset went past padding.
        factor: t > 0, (K,).
        offset: m, (K,), 0 for channels that cannot be shifted; the share is 1 where consumers read most of it.

    Raises:
        ValueError: if shapes do not fit, a factor is not positive, or an offset would not be exact.
    """
    rescale_streams(graph, [(stream, factor, offset)])


def rescale_streams(graph: fx.GraphModule, changes: Iterable[tuple[Stream, Tensor, Tensor | None]]) -> None:
    """Several at once, which saves compiling the graph for each: (stream, factor, offset) as in `rescale_stream`."""
    asked = [(s, t, torch.zeros(s.size) if m is None else m) for s, t, m in changes]
    for change in asked:
        _check(*change)
    nodes = {node.name: node for node in graph.graph.nodes}
    for stream, factor, offset in asked:
        for port in stream.producers:
            _change(graph, nodes[port.node], *_at(port, factor, offset))
    for stream, factor, offset in asked:  # then, since a consumer's border map is in the units of its changed output
        for port in stream.consumers:
            undo(graph, nodes[port.node], *_at(port, factor, offset))
    tidy(graph)


def _check(stream: Stream, factor: Tensor, offset: Tensor) -> None:
    if factor.shape != (stream.size,) or offset.shape != (stream.size,):
        raise ValueError(f"factor and offset must be of shape ({stream.size},)")
    if not bool((factor > 0).all()) or not bool((torch.isfinite(factor) & torch.isfinite(offset)).all()):
        raise ValueError("factors must be positive, factors and offsets finite")
    if bool(offset[~(stream.shiftable | stream.past_padding)].any()):
        raise ValueError(f"the stream of {stream.producers[0].node} cannot be shifted in all of these channels")


def _at(port: Port, factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and offset of each of a port's channels, float64."""
    t = torch.cat([factor.double().cpu(), torch.ones(1).double()])[port.channels]
    m = torch.cat([offset.double().cpu(), torch.zeros(1).double()])[port.channels] * port.share
    return t, m


def _change(graph: fx.GraphModule, producer: fx.Node, t: Tensor, m: Tensor) -> None:
    value = constant(graph, producer)
    if value is not None:
        changed = ((value.double() - m.to(value.device)) / t.to(value.device)).to(value.dtype)
        producer.target = add_constant(graph, str(producer.target), changed, producer).target  # the name stays
        return
    if is_call(producer, NORMS):
        weight, bias = (constant(graph, argument(producer, name)) for name in ("weight", "bias"))
        device = next((buffer.device for buffer in graph.buffers()), None)
        weight = torch.ones(len(t), dtype=producer.meta["dtype"], device=device) if weight is None else weight
    else:
        weight, bias = weight_of(graph, producer)  # type: ignore[misc]
    t, m = t.to(weight.device), m.to(weight.device)
    if bias is not None or bool(m.any()):
        bias = ((-m if bias is None else bias.double() - m) / t).to(weight.dtype)
    wide = weight.double() / t.view(-1, *[1] * (weight.ndim - 1))
    set_weight(graph, producer, wide.to(weight.dtype), bias)


# Finding ----------------------------------------------------------------------------------------------------------


class _Groups:
    """Sets of nodes that are joined two by two."""

    def __init__(self) -> None:
        self._above: dict[fx.Node, fx.Node] = {}

    def find(self, node: fx.Node) -> fx.Node:
        while node in self._above:
            node = self._above[node]
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        first, second = self.find(a), self.find(b)
        if first is not second:
            self._above[first] = second


def _channels(trace: Trace, roots: Tensor, graph: fx.GraphModule) -> dict[fx.Node, set[int]]:
    """The channels, by their roots, that each value holds and that may be changed; in graph order."""
    held = {end.node: [end.ids] for end in trace.producers}
    for node, step in trace.steps.items():
        held[node] = list(step.index) if isinstance(step.index, tuple | list) else [step.index]
    found = {}
    for node in graph.graph.nodes:
        if node in held:
            ids = [torch.unique(roots[unspread(index)]) for index in held[node]]
            found[node] = set(torch.cat(ids).tolist()) - {FIXED}
    return found


def _stream(trace: Trace, roots: Tensor, values: dict[fx.Node, set[int]], nodes: list[fx.Node]) -> Stream | None:
    """The stream of some values, None where no layer reads it."""
    held = set(nodes)
    producers = [end for end in trace.producers if end.node in held]
    consumers = [end for end in trace.consumers if end.source in held]
    channel = torch.full((len(roots),), UNCHANGED)
    named = sorted(set().union(*(values[end.node] for end in producers)))
    channel[torch.tensor(named)] = torch.arange(len(named))
    maps = [channel[roots[end.ids]] for end in (*producers, *consumers)]
    reading = [(end, m) for end, m in zip(consumers, maps[len(producers) :], strict=True) if (m >= 0).any()]
    if not reading:
        return None

    present = {node: _marked(channel[torch.tensor(sorted(values[node]))], len(named)) for node in nodes}
    offsets = arrivals(trace.steps, nodes, present, {end.node: i for i, end in enumerate(producers)})
    rows = [torch.where(_marked(m, len(named)), offsets.at[end.source], 0.0) for end, m in reading]  # type: ignore[index]
    blocked = [False] * len(offsets.blocked)
    free = entering(rows + offsets.blocked, [not end.padded for end, _ in reading] + blocked)
    shiftable = (free != 0).any(0)
    sent = torch.where(shiftable, free, entering(rows + offsets.blocked, [True] * len(rows) + blocked))
    received = torch.stack([(row.nan_to_num() * sent).sum(0) for row in rows])
    return Stream(
        tuple(node.name for node in nodes),
        tuple(_port(end, m, shares) for end, m, shares in zip(producers, maps, sent, strict=False)),
        tuple(_port(end, m, shares) for (end, m), shares in zip(reading, received, strict=True)),
        len(named),
        shiftable,
        (received != 0).any(0) & ~shiftable,
    )


def _marked(channels: Tensor, size: int) -> Tensor:
    """Bool (K,): which channels occur."""
    marked = torch.zeros(size, dtype=torch.bool)
    marked[channels[channels != UNCHANGED]] = True
    return marked


def _port(end: End, channels: Tensor, shares: Tensor) -> Port:
    return Port(end.node.name, channels, torch.cat([shares, torch.zeros(1).double()])[channels])
