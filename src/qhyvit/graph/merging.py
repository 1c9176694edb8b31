"""Parallel linear branches added together, merged into one convolution or linear.

Covers re-parameterizable blocks (3×3 + 1×1 + BatchNorm branches) and several classifier heads that are averaged. A
bare residual `x + conv(x)` is left alone: merging the identity is exact too, but a kernel with ones on its diagonal
has a far wider range than its neighbours and quantizes badly.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from qhyvit.graph.ops import (
    LINEAR,
    WEIGHTED,
    argument,
    as_list,
    aten,
    is_call,
    set_weight,
    shape,
    weight_of,
)


def merge_branches(graph: fx.GraphModule) -> int:
    """Merge each sum of two linear branches of one input; returns how many were merged."""
    merged = 0
    for node in list(graph.graph.nodes):
        if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
            continue
        a, b = node.args
        if a is b or not is_call(a, WEIGHTED) or not is_call(b, WEIGHTED):
            continue
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        if a.target != b.target or a.args[0] is not b.args[0] or len(a.users) != 1 or len(b.users) != 1:
            continue
        if weight_of(graph, a) is None or weight_of(graph, b) is None or shape(a) != shape(b):
            continue
        merged += _merge(graph, node, a, b)
    return merged


def _merge(graph: fx.GraphModule, node: fx.Node, a: fx.Node, b: fx.Node) -> int:
    (wa, ba), (wb, bb) = weight_of(graph, a), weight_of(graph, b)  # type: ignore[misc]
    keeper, other = (a, b) if wa.numel() >= wb.numel() else (b, a)
    if keeper is b:
        (wa, ba), (wb, bb) = (wb, bb), (wa, ba)
    if not is_call(keeper, LINEAR):
        fitted = _fit_kernels(keeper, wa, other, wb)
        if fitted is None:
            return 0
        wa, wb = fitted
    bias = ba if bb is None else bb if ba is None else ba + bb
    if list(graph.graph.nodes).index(keeper) < list(graph.graph.nodes).index(other):
        node.prepend(keeper)  # its new constants are created beside it; order does not matter to the shared input
    set_weight(graph, keeper, wa + wb, bias)
    node.replace_all_uses_with(keeper)
    graph.graph.erase_node(node)
    return 1


def _fit_kernels(a: fx.Node, wa: Tensor, b: fx.Node, wb: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both kernels in the groups and the size of a's, or None where strides, dilations or borders do not agree."""
    n = wa.ndim - 2
    if as_list(argument(a, "stride", 1), n) != as_list(argument(b, "stride", 1), n):
        return None
    if any(d != 1 for x in (a, b) for d in as_list(argument(x, "dilation", 1), n)):
        return None
    pads: list[int] = []
    pa, pb = as_list(argument(a, "padding", 0), n), as_list(argument(b, "padding", 0), n)
    for axis in reversed(range(n)):
        before = pa[axis] - pb[axis]
        after = wa.shape[axis + 2] - wb.shape[axis + 2] - before
        if before < 0 or after < 0:
            return None
        pads += [before, after]
    ga, gb = argument(a, "groups", 1) or 1, argument(b, "groups", 1) or 1
    if ga != gb:
        if gb % ga:
            return None
        wb = _widen_groups(wb, gb, ga)
    return wa, F.pad(wb, pads)


def _widen_groups(weight: Tensor, groups: int, target: int) -> Tensor:
    """The same convolution with fewer groups: zeros where an input channel was not read."""
    out_channels, per_group = weight.shape[0], weight.shape[1]
    ratio = groups // target
    wide = torch.zeros(out_channels, per_group * ratio, *weight.shape[2:], dtype=weight.dtype, device=weight.device)
    each = out_channels // groups
    for group in range(groups):
        rows = slice(group * each, (group + 1) * each)
        first = (group % ratio) * per_group
        wide[rows, first : first + per_group] = weight[rows]
    return wide
