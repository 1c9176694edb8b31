"""Attention found by what it computes: a mixture of positions whose weights depend on the picture.

Recognised are
* softmax, then a product with other values: softmax(q·kᵀ)·v, softmax(k)ᵀ·v (factorised), and a product followed by a
  sum over the softmax's axis (MobileViTv2: sum of softmax(q)·k over positions);
* two chained matrix products without softmax: (q·kᵀ)·v and q·(kᵀ·v), as in linear attention.

Between score and mixture may stand what works on each number, and one 1×1 layer over the heads ("talking heads").
A softmax over experts or branches is told apart by its scores, which are computed from one pooled position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from qhyvit.graph.flow import Flow, union
from qhyvit.graph.ops import LAYOUT, MATMUL, argument, as_list, aten, is_call, shape

_SUMS = frozenset({aten.sum.dim_IntList, aten.mean.dim})
_ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor})
# Layers that mix channels in one transformer block: output projection and feed-forward network.
_TRANSFORMER_DEPTH = 3


@dataclass(frozen=True)
class Attention:
    """One attention, from its scores to its mixture.

    Attributes:
        inside: set of its nodes (see `Flow`), from the first product or softmax to the last product.
        operands: what these nodes read from outside, in graph order: queries, keys and values, maybe projected.
        value: the operand that the softmax's result is multiplied with; without softmax, one from the value's stream.
        result: the last product.
        fixed_query: whether the scores come from a product with a constant, as with learned queries.
    """

    inside: int
    operands: tuple[fx.Node, ...]
    value: fx.Node
    result: fx.Node
    fixed_query: bool


def find_attentions(flow: Flow) -> list[Attention]:
    """All attentions of a graph, in the order in which they end."""
    links = {n: _sources(flow, n) for n in flow.nodes if _mixes(flow, n)}
    groups: dict[fx.Node, set[fx.Node]] = {}
    for node, sources in links.items():
        group = {node}.union(*(groups[s] for s in sources))
        for member in group:
            groups[member] = group
    distinct = {id(group): group for group in groups.values()}.values()
    found = [_attention(flow, group, links) for group in distinct if _is_attention(flow, group, links)]
    return sorted(found, key=lambda a: a.inside.bit_length())


def _mixes(flow: Flow, node: fx.Node) -> bool:
    return is_call(node, aten.softmax.int) or _is_product(flow, node) or _weighted_sum(flow, node) is not None


def _is_product(flow: Flow, node: fx.Node) -> bool:
    return is_call(node, MATMUL) and len([a for a in node.args if a in flow.inputs]) == 2


def _weighted_sum(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The softmax of a sum, over the softmax's axis, of softmax × values; None for any other node."""
    if not is_call(node, _SUMS):
        return None
    product = flow.inputs[node][0]
    if not is_call(product, aten.mul.Tensor) or len(flow.inputs[product]) != 2:
        return None
    axes = argument(node, "dim")
    rank = len(shape(product))
    for softmax in (n for operand in flow.inputs[product] for n in _above(flow, operand)):
        if is_call(softmax, aten.softmax.int) and len(shape(softmax)) == rank:
            axis = argument(softmax, "dim") % rank
            if axes is not None and axis in {a % rank for a in as_list(axes, 1)}:
                return softmax
    return None


def _sources(flow: Flow, node: fx.Node) -> set[fx.Node]:
    """The products and softmaxes that a product or softmax takes its numbers from, no layer or residual between."""
    if is_call(node, _SUMS):
        softmax = _weighted_sum(flow, node)
        return set() if softmax is None else {softmax}
    through = is_call(node, aten.softmax.int)  # scores may be sums: q·kᵀ + a bias that depends on the query
    return {n for source in flow.inputs[node] for n in _above(flow, source, additions=through)}


def _above(flow: Flow, node: fx.Node, *, additions: bool = False) -> Iterator[fx.Node]:
    """The nearest products and softmaxes at or above a node, and the layer over heads next to a softmax crossed."""
    pending, seen = [node], {node}
    while pending:
        here = pending.pop()
        further: tuple[fx.Node, ...] = flow.inputs[here]
        if is_call(here, aten.softmax.int) or _is_product(flow, here):
            yield here
            continue
        if flow.is_layer(here):
            further = further if _over_heads(flow, here, scores=additions) else ()
        elif is_call(here, _ADDITIONS) and len(further) > 1 and not additions:
            further = ()
        for source in further:
            if source not in seen:
                seen.add(source)
                pending.append(source)


def _over_heads(flow: Flow, layer: fx.Node, *, scores: bool) -> bool:
    """Whether a layer mixes the heads of scores (before a softmax) or of a softmax's result."""
    node = flow.inputs[layer][0]
    if not flow.is_pointwise(layer) or shape(layer) != shape(node):
        return False
    while flow.is_elementwise(node) or is_call(node, LAYOUT):
        node = flow.inputs[node][0]
    return _is_product(flow, node) if scores else is_call(node, aten.softmax.int)


def _is_attention(flow: Flow, group: set[fx.Node], links: dict[fx.Node, set[fx.Node]]) -> bool:
    mixtures = [n for n in group if not is_call(n, aten.softmax.int) and links[n]]
    return bool(mixtures) and (
        not any(is_call(n, _SUMS) for n in mixtures) or any(_over_positions(flow, n) for n in group)
    )


def _over_positions(flow: Flow, node: fx.Node) -> bool:
    """Whether a softmax's scores come from more than one position of a picture."""
    if not is_call(node, aten.softmax.int):
        return False
    here = node
    while flow.inputs[here]:
        here = flow.inputs[here][0]
        if flow.is_layer(here):
            return flow.positions(here) > 1
    return True


def _attention(flow: Flow, group: set[fx.Node], links: dict[fx.Node, set[fx.Node]]) -> Attention:
    inside = union(flow.after, group) & union(flow.before, group)
    nodes = flow.members(inside)
    read = [
        (n, o) for n in nodes if not _adds_bias(flow, n, inside) for o in flow.inputs[n] if not inside & flow.bit(o)
    ]
    operands = tuple(sorted({operand for _, operand in read}, key=flow.position.__getitem__))
    softmaxes = [n for n in nodes if is_call(n, aten.softmax.int)]
    scores = union(flow.before, softmaxes)
    mixed = [operand for node, operand in read if softmaxes and not scores & flow.bit(node)]
    # without softmax, in q·(kᵀ·v) and (q·kᵀ)·v, the first product's right factor is v, or k from the same stream
    value = mixed[0] if mixed else next((n for n in operands if n is nodes[0].args[1]), operands[-1])
    fixed = any(_fixed_scores(flow, n) for n in softmaxes if not links[n])
    return Attention(inside, operands, value, nodes[-1], fixed)


def _adds_bias(flow: Flow, node: fx.Node, inside: int) -> bool:
    """Whether a node adds something from outside to scores, such as relative positions: no query, key or value."""
    return is_call(node, _ADDITIONS) and any(inside & flow.bit(n) for n in flow.inputs[node])


def _fixed_scores(flow: Flow, softmax: fx.Node) -> bool:
    """Whether the scores are a product with a constant; a layer's product is a projection and does not count."""
    node = flow.inputs[softmax][0]
    while len(flow.inputs[node]) == 1 and not flow.is_layer(node):
        if is_call(node, MATMUL):
            return True
        node = flow.inputs[node][0]
    return False


@dataclass(frozen=True)
class History:
    """How a value came about: the last attention before it (-1: none), and what was done since.

    Attributes:
        attention: its index.
        depth: layers that mix channels since, on the longest path.
        local: whether local layers followed.
        layers: the nearest layers above, none of which depends on another; gates and attentions are not looked through.
    """

    attention: int = -1
    depth: int = 0
    local: bool = False
    layers: frozenset[fx.Node] = frozenset()


def histories(flow: Flow, attentions: list[Attention]) -> dict[fx.Node, History]:
    """The history of every value.

    Layers are local from the first convolution on; after an attention, from a convolution over positions on that lies
    behind as many layers as end a transformer block. What gates (operands of fewer positions) is not followed.
    """
    inside = {node: i for i, attention in enumerate(attentions) for node in flow.members(attention.inside)}
    history: dict[fx.Node, History] = {}
    for node in flow.nodes:
        if node in inside:
            history[node] = History(inside[node])
            continue
        past = _merged(flow, node, history)
        if flow.is_layer(node):
            depth = past.depth + (flow.mixes_channels(node) and flow.positions(node) > 1)
            here = is_call(node, aten.conv2d.default)
            if past.attention >= 0:
                here = here and not flow.is_pointwise(node) and depth > _TRANSFORMER_DEPTH
            past = History(past.attention, depth, past.local or here, frozenset({node}))
        history[node] = past
    return history


def _merged(flow: Flow, node: fx.Node, history: dict[fx.Node, History]) -> History:
    inputs = flow.inputs[node]
    if len(inputs) < 2:
        return history[inputs[0]] if inputs else History()
    attention = max(history[n].attention for n in inputs)
    latest = [history[n] for n in inputs if history[n].attention == attention]
    size = math.prod(node.meta.get("shape", ()))
    full = [n for n in inputs if "shape" in n.meta and math.prod(shape(n)) == size]
    layers = frozenset().union(*(history[n].layers for n in full or inputs))
    layers = frozenset(n for n in layers if not any(flow.ancestor(n, of=m) for m in layers))
    return History(attention, max(h.depth for h in latest), any(h.local for h in latest), layers)
