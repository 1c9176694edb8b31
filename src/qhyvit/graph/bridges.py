"""Bridge blocks: where a tensor passes from convolutions to attention over positions (Q-HyViT, arXiv 2303.12557).

Found from the graph's structure alone, by these rules:

* The stream that an attention reads is the last value, above its projections, that also goes past the attention (the
  residual); without a residual, the input of the projections. All layers between stream and attention are projections:
  query, key and value, fused or separate, and what stands before them, such as a strided convolution.
* An attention is a hand-over if its stream comes from local layers: from any convolution if there was no attention yet;
  after one, from a convolution over positions that lies behind the output projection and one feed-forward network (two
  layers that mix channels) of that attention. So neither the convolutions inside feed-forward networks nor those
  that encode positions count, while a local block or a convolution that reduces the resolution does.
* The block's members are the last convolutions of the stream, with the 1×1 layers that activations alone join to them
  (a channel MLP), and the projections. Where a value is mixed without projection, the layer after the attention is its
  projection. Attentions that read the same last convolutions share one block.
* Two-way cross attention (Mobile-Former): query and value come from two streams with attention between them before, one
  made last by convolutions (the map), the other by linears (the tokens), and the result is added to the query's stream.
  Each is a hand-over: map to tokens with members as above, tokens to map with the projections alone. If there are both
  kinds, the entry, whose queries are constants, and the exit, after which nothing is handed over, are left out.

A plain vision transformer has one block: patch embedding and first projection. Each stage of a pyramid that begins with
a convolution over positions has one, too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from qhyvit.graph.attentions import Attention, History, find_attentions, histories
from qhyvit.graph.flow import Flow, union
from qhyvit.graph.ops import LAYOUT, Target, aten, is_call

_PARTS: frozenset[Target] = frozenset(
    {
        aten.unbind.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.select.int,
        aten.slice.Tensor,
        operator.getitem,
    }
)
_ADD = aten.add.Tensor


@dataclass(frozen=True)
class BridgeBlock:
    """One hand-over from convolutions to attention.

    Attributes:
        members: node names of the convolutions and projections, in graph order.
        modules: their dotted module names.
        inputs: names of the values that `nodes` read from outside, constants excluded, in the order they are read; the
            first is the input of the first member.
        nodes: all nodes that depend on a member and on which an output depends, members included, in graph order.
        outputs: names of the last members: one for a fused projection, three for separate query, key and value.
    """

    members: tuple[str, ...]
    modules: tuple[str, ...]
    inputs: tuple[str, ...]
    nodes: tuple[str, ...]
    outputs: tuple[str, ...]


def find_bridges(graph: fx.GraphModule, *, exclude_entry_exit: bool = True) -> tuple[BridgeBlock, ...]:
    """The bridge blocks of a captured graph, in the order of their attentions; none where either kind is missing.

    Args:
        graph: a captured graph after the normalising passes; it is not changed.
        exclude_entry_exit: leave out the first and the last hand-over of two-way cross attention (see above).
    """
    flow = Flow(graph)
    handovers = list(_handovers(flow))
    if exclude_entry_exit and any(h.kind == "to map" for h in handovers):
        handovers = [h for h in handovers if not _is_end(flow, h, handovers)]
    groups = sorted(_shared(handovers), key=lambda g: min(flow.position[h.attention.result] for h in g))
    return tuple(_block(flow, group) for group in groups)


@dataclass(frozen=True)
class _Stream:
    """What an attention reads in one place: the value, and the layers from there to the attention."""

    source: fx.Node
    projections: frozenset[fx.Node]


@dataclass(frozen=True)
class _Handover:
    attention: Attention
    members: frozenset[fx.Node]
    last: fx.Node | None  # the layer after the attention, if it is a member
    kind: str  # "self", "to tokens", "to map"


def _handovers(flow: Flow) -> Iterator[_Handover]:
    attentions = find_attentions(flow)
    history = histories(flow, attentions)
    everything = 0
    for attention in attentions:
        everything |= attention.inside
    for attention in attentions:
        others = everything & ~attention.inside
        groups = _groups(flow, attention, others)
        values = next(g for g in groups if attention.value in g)
        stream = _stream(flow, attention, values)
        if len(groups) == 2:
            query = _stream(flow, attention, next(g for g in groups if g is not values))
            found = _two_way(flow, history, attention, query, stream)
            if found is not None:
                yield found
                continue
        between = flow.after[stream.source] & union(flow.before, values) & ~flow.bit(stream.source)
        past = history[stream.source]
        local = _local_end(flow, history, past.layers) if past.local and not between & others else frozenset()
        if local:
            yield _handover(flow, attention, stream, local | stream.projections, "self")


def _groups(flow: Flow, attention: Attention, others: int) -> list[list[fx.Node]]:
    """The operands by stream: two are of one stream if no attention lies between them and their last common value."""
    groups: list[list[fx.Node]] = []
    for operand in attention.operands:
        for group in groups:
            common = flow.dominator([group[0], operand])
            if common is None:
                continue
            between = flow.after[common] & ~flow.bit(common) & union(flow.before, [group[0], operand])
            if not between & others:
                group.append(operand)
                break
        else:
            groups.append([operand])
    return groups


def _stream(flow: Flow, attention: Attention, operands: list[fx.Node]) -> _Stream:
    """Climb from some operands to the value that goes past the attention; see the module's first rule."""
    above, first = union(flow.before, operands), None
    node = flow.dominator(operands)
    while node is not None:
        between = flow.members(flow.after[node] & above & ~flow.bit(node))
        layers = frozenset(n for n in between if flow.is_layer(n))
        stream = _Stream(node, layers)
        divided = any(is_call(n, _PARTS) for n in between)  # a fused projection: its parts, not itself, are used
        if (layers or not divided) and flow.bypassed(node, attention.inside | flow.bits(layers)):
            return stream
        if layers:
            first = first or stream
            if flow.is_layer(node) and flow.mixes_channels(node) and not flow.is_pointwise(node):
                break
        node = flow.dominator([node], strict=True)
    return first or _Stream(operands[0], frozenset())


def _two_way(
    flow: Flow, history: dict[fx.Node, History], attention: Attention, query: _Stream, value: _Stream
) -> _Handover | None:
    """Cross attention between a map and tokens whose result is added to the query's stream."""
    maps = [any(is_call(n, aten.conv2d.default) for n in history[stream.source].layers) for stream in (query, value)]
    if maps[0] == maps[1] or not _takes_up(flow, query.source, attention.result):
        return None
    members = query.projections | value.projections
    if maps[1]:
        members |= _local_end(flow, history, history[value.source].layers)
    if not members:
        return None
    return _handover(flow, attention, value, members, "to tokens" if maps[1] else "to map")


def _takes_up(flow: Flow, source: fx.Node, result: fx.Node) -> bool:
    """Whether `source`, rearranged at most, is added to something that depends on `result`."""
    pending = [source]
    while pending:
        for user in flow.users[pending.pop()]:
            if is_call(user, LAYOUT):
                pending.append(user)
            elif is_call(user, _ADD) and flow.ancestor(result, of=user):
                return True
    return False


def _handover(flow: Flow, attention: Attention, value: _Stream, members: frozenset[fx.Node], kind: str) -> _Handover:
    projected = any(flow.before[attention.value] & flow.bit(n) for n in value.projections)
    last = None if projected or kind == "to map" else _layer_after(flow, attention.result)
    return _Handover(attention, members | ({last} if last else set()), last, kind)


def _layer_after(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The first layer that reads a value before it is added to another."""
    pending, seen = [node], {node}
    while pending:
        for user in flow.users[pending.pop()]:
            if user not in seen:
                seen.add(user)
                added = is_call(user, _ADD) and len(flow.inputs[user]) > 1
                pending += [] if added or flow.is_layer(user) else [user]
    return min(filter(flow.is_layer, seen), key=flow.position.__getitem__, default=None)


def _local_end(flow: Flow, history: dict[fx.Node, History], layers: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """The last convolutions: `layers`, the rest of a channel MLP they end, and what lies behind a convolution."""
    found, newest = set(layers), set(layers)
    while newest:
        newest = {n for layer in newest for n in _mlp_before(flow, layer)} - found
        if not newest and not any(is_call(n, aten.conv2d.default) for n in found):
            newest = {n for layer in found for n in history[flow.inputs[layer][0]].layers} - found
        found |= newest
    return frozenset(found) if any(is_call(n, aten.conv2d.default) for n in found) else frozenset()


def _mlp_before(flow: Flow, layer: fx.Node) -> set[fx.Node]:
    node = flow.inputs[layer][0]
    while flow.is_elementwise(node):
        node = flow.inputs[node][0]
    joined = flow.is_layer(node) and flow.is_pointwise(node) and flow.is_pointwise(layer) and flow.positions(layer) > 1
    return {node} if joined else set()


def _is_end(flow: Flow, handover: _Handover, handovers: list[_Handover]) -> bool:
    """Whether a hand-over is the entry to the tokens or the exit from the map."""
    result = handover.attention.result
    if handover.kind == "to tokens":
        return not any(flow.ancestor(result, of=h.attention.result) for h in handovers)
    return handover.kind == "self" and handover.attention.fixed_query


def _shared(handovers: list[_Handover]) -> list[list[_Handover]]:
    """Hand-overs with a member in common, together."""
    groups: list[list[_Handover]] = []
    for handover in handovers:
        touched = [g for g in groups if any(h.members & handover.members for h in g)]
        groups = [g for g in groups if g not in touched] + [[h for g in touched for h in g] + [handover]]
    return groups


def _block(flow: Flow, handovers: list[_Handover]) -> BridgeBlock:
    members = sorted(frozenset().union(*(h.members for h in handovers)), key=flow.position.__getitem__)
    outputs = sorted({n for h in handovers for n in _last_members(flow, h)}, key=flow.position.__getitem__)
    nodes = flow.members(union(flow.after, members) & union(flow.before, outputs))
    inside = set(nodes)
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n.op != "get_attr" and n not in inside)
    return BridgeBlock(
        tuple(n.name for n in members),
        tuple(str(n.meta["module"]) for n in members),
        tuple(n.name for n in read),
        tuple(n.name for n in nodes),
        tuple(n.name for n in outputs),
    )


def _last_members(flow: Flow, handover: _Handover) -> Iterable[fx.Node]:
    """The layer after the attention, or the members that reach the attention on a path without another."""
    if handover.last is not None:
        return {handover.last}
    reached = set(handover.attention.operands)
    pending = list(reached)
    while pending:
        node = pending.pop()
        new = [] if node in handover.members else [n for n in flow.inputs[node] if n not in reached]
        reached.update(new)
        pending += new
    return reached & handover.members
