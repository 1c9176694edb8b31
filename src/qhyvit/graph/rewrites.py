"""Rare operators written with common ones, so that passes, sites and exporters have fewer to know."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from qhyvit.graph.ops import add_constant, argument, as_list, aten, constant, insert, shape, shortens_batch

# Takes the graph and a node; returns the node that has its value, or None where nothing was changed.
Rewrite = Callable[[fx.GraphModule, fx.Node], fx.Node | None]
REWRITES: dict[Any, Rewrite] = {}


def rewrites(*targets: Any) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite for ATen overloads."""

    def enter(function: Rewrite) -> Rewrite:
        REWRITES.update(dict.fromkeys(targets, function))
        return function

    return enter


def _reshape(graph: fx.GraphModule, node: fx.Node, x: fx.Node, sizes: Sequence[int]) -> fx.Node:
    """A reshape that leaves the first axis, which holds the pictures, free."""
    return insert(graph, node, aten.reshape.default, x, [-1, *sizes[1:]])


@rewrites(aten.add.Tensor, aten.sub.Tensor)
def _alpha(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if argument(node, "alpha") == 1:
        return None
    x, other = node.args
    if isinstance(other, fx.Node):
        scaled: Any = insert(graph, node, aten.mul.Tensor, other, argument(node, "alpha"))
    else:
        scaled = other * argument(node, "alpha")
    return insert(graph, node, node.target, x, scaled)


@rewrites(aten.var_mean.correction)
def _var_mean(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, dim, keep = node.args[0], argument(node, "dim"), argument(node, "keepdim")
    users = list(node.users)
    if dim is None or any(u.target is not operator.getitem for u in users):
        return None
    for user in users:
        if user.args[1] == 0:
            kwargs = {"correction": argument(node, "correction"), "keepdim": keep}
            new = insert(graph, node, aten.var.correction, x, dim, **kwargs)
        else:
            new = insert(graph, node, aten.mean.dim, x, dim, keep)
        user.replace_all_uses_with(new)
        graph.graph.erase_node(user)
    return node


@rewrites(aten.instance_norm.default)
def _instance_norm(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if not argument(node, "use_input_stats"):
        return None
    x, weight, bias = (argument(node, n) for n in ("input", "weight", "bias"))
    return insert(graph, node, aten.group_norm.default, x, shape(x)[1], weight, bias, argument(node, "eps"))


@rewrites(aten.copy.default)
def _copy(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Functionalised assignments: what is written over does not matter."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    same = shape(source) == shape(node) and source.meta["dtype"] == node.meta["dtype"]
    return source if same else None


@rewrites(aten.slice_scatter.default)
def _slice_scatter(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    base, source = node.args[:2]
    axis = argument(node, "dim") % len(shape(node))
    if argument(node, "step") != 1 or shortens_batch(node):
        return None
    start, end, _ = slice(argument(node, "start"), argument(node, "end")).indices(shape(node)[axis])
    return _splice(graph, node, base, source, (axis, start, end))


def _splice(graph: fx.GraphModule, node: fx.Node, base: Any, source: Any, where: tuple[int, int, int]) -> fx.Node:
    """`base` with `source` in place of base[start:end] along an axis."""
    axis, start, end = where
    parts = [source]
    if start > 0:
        parts.insert(0, insert(graph, node, aten.slice.Tensor, base, axis, 0, start))
    if end < shape(node)[axis]:
        parts.append(insert(graph, node, aten.slice.Tensor, base, axis, end, shape(node)[axis]))
    return source if len(parts) == 1 else insert(graph, node, aten.cat.default, parts, axis)


@rewrites(aten.index.Tensor)
def _index(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """x[:, i, j, :] with constant i, j on neighbouring axes: the axes made one, then one index_select."""
    x, indices = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(indices, list | tuple)
    used = [i for i, index in enumerate(indices) if index is not None]
    if not used or used[0] == 0 or used != list(range(used[0], used[-1] + 1)):
        return None
    found = [constant(graph, indices[i]) for i in used]
    values = [v for v in found if v is not None]
    if len(values) != len(found) or any(v.dtype == torch.bool for v in values):
        return None
    size, first, last = shape(x), used[0], used[-1] + 1
    flat = torch.zeros((), dtype=torch.int64)
    for axis, value in zip(used, values, strict=True):
        flat = flat * size[axis] + value % size[axis]
    merged = x
    if len(used) > 1:
        merged = _reshape(graph, node, x, [*size[:first], math.prod(size[first:last]), *size[last:]])
    picked = _select(graph, node, merged, first, flat.flatten())
    return picked if flat.ndim == 1 else _reshape(graph, node, picked, shape(node))


def _select(graph: fx.GraphModule, node: fx.Node, x: fx.Node, axis: int, index: torch.Tensor) -> fx.Node:
    stored = add_constant(graph, f"{node.name}_index", index.contiguous(), node)
    return insert(graph, node, aten.index_select.default, x, axis, stored)


@rewrites(aten.unfold.default)
def _unfold(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Sliding windows along one axis; the window becomes the last axis."""
    x, size, step = node.args[0], argument(node, "size"), argument(node, "step")
    assert isinstance(x, fx.Node)
    old = list(shape(x))
    axis = argument(node, "dimension") % len(old)
    count = shape(node)[axis]
    if axis == 0:
        return None
    index = torch.arange(count)[:, None] * step + torch.arange(size)
    picked = _select(graph, node, x, axis, index.flatten())
    windows = _reshape(graph, node, picked, [*old[:axis], count, size, *old[axis + 1 :]])
    order = [i for i in range(len(old) + 1) if i != axis + 1]
    return insert(graph, node, aten.permute.default, windows, [*order, axis + 1])


@rewrites(aten.im2col.default)
def _im2col(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Patches (N, C, H, W) → (N, C·kh·kw, positions)."""
    x = node.args[0]
    kernel, dilation, padding, stride = (
        as_list(argument(node, n), 2) for n in ("kernel_size", "dilation", "padding", "stride")
    )
    if any(padding):
        pads = [padding[1], padding[1], padding[0], padding[0]]
        x = insert(graph, node, aten.constant_pad_nd.default, x, pads, 0.0)
    assert isinstance(x, fx.Node)
    counts = []
    for i, axis in enumerate((2, 3)):
        counts.append((shape(x)[axis] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1)
    for i, axis in enumerate((2, 3)):
        index = torch.arange(kernel[i])[:, None] * dilation[i] + torch.arange(counts[i]) * stride[i]
        x = _select(graph, node, x, axis, index.flatten())
    patches = _reshape(graph, node, x, [1, shape(x)[1], kernel[0], counts[0], kernel[1], counts[1]])
    ordered = insert(graph, node, aten.permute.default, patches, [0, 1, 2, 4, 3, 5])
    return _reshape(graph, node, ordered, shape(node))


@rewrites(aten.col2im.default)
def _col2im(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Overlapping patches added up: a transposed convolution whose kernel holds a one for each place in the patch."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    size, kernel, dilation, padding, stride = (
        as_list(argument(node, n), 2) for n in ("output_size", "kernel_size", "dilation", "padding", "stride")
    )
    places = kernel[0] * kernel[1]
    channels = shape(x)[1] // places
    reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    counts = [(n - r) // s + 1 for n, r, s in zip(size, reach, stride, strict=True)]
    extra = [n - (c - 1) * s - r for n, c, s, r in zip(size, counts, stride, reach, strict=True)]
    patches = _reshape(graph, node, x, [1, shape(x)[1], *counts])
    ones = torch.eye(places, dtype=node.meta["dtype"]).view(places, 1, *kernel).repeat(channels, 1, 1, 1)
    weight = add_constant(graph, f"{node.name}_weight", ones, node)
    args = (patches, weight, None, stride, padding, extra, channels, dilation)
    return insert(graph, node, aten.conv_transpose2d.input, *args)


@rewrites(aten.adaptive_max_pool2d.default)
def _adaptive_max_pool(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Windows gathered side by side, the shorter ones filled up with their own last entry, then the largest of each."""
    readers = list(node.users)
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in readers):
        return None
    x, wanted = node.args[0], as_list(argument(node, "output_size"), 2)
    assert isinstance(x, fx.Node)
    batch, channels, *size = shape(x)
    lengths = []
    for axis in range(2):
        start = torch.arange(wanted[axis]) * size[axis] // wanted[axis]
        end = -(-(torch.arange(wanted[axis]) + 1) * size[axis] // wanted[axis])
        lengths.append(int((end - start).max()))
        index = torch.minimum(start[:, None] + torch.arange(lengths[axis]), end[:, None] - 1)
        x = _select(graph, node, x, axis + 2, index.flatten())
    windows = _reshape(graph, node, x, [batch, channels, wanted[0], lengths[0], wanted[1], lengths[1]])
    largest = insert(graph, node, aten.amax.default, windows, [3, 5])
    for reader in readers:
        reader.replace_all_uses_with(largest)
        graph.graph.erase_node(reader)
    return node


@rewrites(aten.channel_shuffle.default)
def _channel_shuffle(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    groups, (_, channels, *rest) = argument(node, "groups"), shape(node)
    split = _reshape(graph, node, node.args[0], [1, groups, channels // groups, *rest])  # type: ignore[arg-type]
    turned = insert(graph, node, aten.transpose.int, split, 1, 2)
    return _reshape(graph, node, turned, shape(node))


@rewrites(aten.pixel_unshuffle.default)
def _pixel_unshuffle(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    r = argument(node, "downscale_factor")
    channels, height, width = shape(node)[1] // r**2, *shape(node)[2:]
    split = _reshape(graph, node, node.args[0], [1, channels, height, r, width, r])  # type: ignore[arg-type]
    turned = insert(graph, node, aten.permute.default, split, [0, 1, 3, 5, 2, 4])
    return _reshape(graph, node, turned, shape(node))
