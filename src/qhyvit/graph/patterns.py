"""Where published methods apply: norms before layers, softmax before products, activation functions before layers.

All is told from the graph and its sites. What a value passes through on the way to its readers (reshapes, permutations,
splits) does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qhyvit.graph.balance import foldable, shiftable
from qhyvit.graph.channels import channel_indices, consumers
from qhyvit.graph.ops import LAYOUT, MATMUL, WEIGHTED, Target, aten, channel_axis, is_call, shape
from qhyvit.graph.sites import ActivationSite, Sites

NORMS: frozenset[Target] = frozenset({aten.layer_norm.default, aten.group_norm.default})
# Activation functions with a small negative minimum, and that minimum.
MINIMA: dict[Target, float] = {
    aten.gelu.default: -0.1699712,
    aten.silu.default: -0.2784645,
    aten.hardswish.default: -0.375,
}
_PARTING: frozenset[Target] = frozenset(
    {aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
)


@dataclass(frozen=True)
class Fold:
    """A quantized value whose channels can be scaled for free: a norm or layer makes it, only layers read it.

    Attributes:
        site: where it is quantized.
        producer: the norm or layer, whose output it is.
        shiftable: whether an offset is free too (no layer behind pads with zeros).
        layers: names of the layers that read it.
    """

    site: ActivationSite
    producer: fx.Node
    shiftable: bool
    layers: tuple[str, ...]


def folds(graph: fx.GraphModule, sites: Sites, *, layers: bool = False) -> list[Fold]:
    """Norms whose every reader is a linear or convolution; with `layers` also layers in their place.

    `balance.balance` rewrites them exactly.
    """
    nodes = {n.name: n for n in graph.graph.nodes}
    found = []
    for site in sites.activations:
        node = nodes[site.value]
        if not is_call(node, NORMS | WEIGHTED if layers else NORMS):
            continue
        if not foldable(graph, node, site.channel_axis, site.readers):
            continue
        behind = consumers(graph, node, site.channel_axis, site.readers)
        if behind is not None:
            shifts = shiftable(graph, node, site.channel_axis, site.readers)
            found.append(Fold(site, node, shifts, tuple(dict.fromkeys(n.name for n, _ in behind))))
    return found


def softmax_outputs(graph: fx.GraphModule, sites: Sites) -> list[tuple[ActivationSite, fx.Node]]:
    """Quantized softmax outputs that a product (of activations, or a layer) reads, with the softmax."""
    products = MATMUL | WEIGHTED | frozenset({aten.mul.Tensor})
    return _behind(graph, sites, frozenset({aten.softmax.int}), products)


def activation_outputs(graph: fx.GraphModule, sites: Sites) -> list[tuple[ActivationSite, fx.Node]]:
    """Quantized outputs of GELU, SiLU or hard-swish that a convolution or linear reads, with the function's node."""
    return _behind(graph, sites, frozenset(MINIMA), WEIGHTED)


def norm_inputs(graph: fx.GraphModule, sites: Sites) -> list[tuple[ActivationSite, fx.Node]]:
    """Quantized inputs of norms, with the norm; these exist where norms are quantized, in full scope."""
    nodes = {n.name: n for n in graph.graph.nodes}
    found = []
    for site in sites.activations:
        norm = next((r for r in readers(nodes, site) if is_call(r, NORMS)), None)
        if norm is not None:
            found.append((site, norm))
    return found


def readers(nodes: dict[str, fx.Node], site: ActivationSite) -> Iterator[fx.Node]:
    """The operators that compute with a site's codes, seen through layout operators."""
    pending = [nodes[name] for name in site.readers]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if not is_call(node, LAYOUT):
            yield node
            continue
        pending += [user for user in node.users if user not in seen]
        seen |= set(node.users)


def source(node: fx.Node) -> fx.Node:
    """The operator whose numbers a value holds, seen through layout operators."""
    while is_call(node, LAYOUT) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _behind(
    graph: fx.GraphModule, sites: Sites, makers: frozenset[Target], users: frozenset[Target]
) -> list[tuple[ActivationSite, fx.Node]]:
    nodes = {n.name: n for n in graph.graph.nodes}
    found = []
    for site in sites.activations:
        maker = source(nodes[site.value])
        if is_call(maker, makers) and any(is_call(r, users) for r in readers(nodes, site)):
            found.append((site, maker))
    return found


def fused_parts(layer: fx.Node) -> list[Tensor]:
    """Output channels of a layer that are used apart, such as queries, keys and values of one fused projection.

    Returns:
        Disjoint sorted index tensors that together are all channels; one of all channels where nothing parts them.
    """
    count = shape(layer)[channel_axis(layer)]
    whole = [torch.arange(count)]
    node, index = layer, channel_indices(shape(layer), channel_axis(layer))
    while len(node.users) == 1:
        (user,) = node.users
        if not is_call(user, LAYOUT) or user.args[0] is not node or any(isinstance(a, fx.Node) for a in user.args[1:]):
            return whole
        out = user.target(index, *user.args[1:], **user.kwargs)  # type: ignore[operator]
        if is_call(user, _PARTING):
            parts = [part.flatten().unique().long() for part in out]
            together = torch.cat(parts).sort().values
            return parts if len(together) == count else whole
        node, index = user, out
    return whole
