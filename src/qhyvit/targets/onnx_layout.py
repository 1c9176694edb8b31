"""ONNX forms of the operators that only move numbers; they run on integer codes as well as on floats."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from qhyvit.errors import TargetError
from qhyvit.graph.ops import argument, aten, shape
from qhyvit.targets.onnx_ops import lowers

if TYPE_CHECKING:
    from qhyvit.targets.onnx_lowering import Lowering


@lowers(aten.reshape.default)
def _reshape(g: Lowering, node: fx.Node) -> Any:
    sizes = argument(node, "shape")
    if any(isinstance(s, fx.Node) for s in sizes):
        raise TargetError(f"{node.meta.get('module')}: a reshape with several free sizes has no ONNX form.")
    return g.op("Reshape", g.raw(node, flat=True), g.b.ints(*sizes))


@lowers(aten.permute.default)
def _permute(g: Lowering, node: fx.Node) -> Any:
    rank = len(shape(node))
    return g.op("Transpose", g.raw(node), perm=[d % rank for d in argument(node, "dims")])


@lowers(aten.transpose.int)
def _transpose(g: Lowering, node: fx.Node) -> Any:
    order = list(range(len(shape(node))))
    a, b = argument(node, "dim0"), argument(node, "dim1")
    order[a], order[b] = order[b], order[a]
    return g.op("Transpose", g.raw(node), perm=order)


@lowers(aten.unsqueeze.default)
def _unsqueeze(g: Lowering, node: fx.Node) -> Any:
    return g.op("Unsqueeze", g.raw(node), g.b.ints(argument(node, "dim")))


@lowers(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(g: Lowering, node: fx.Node) -> Any:
    dims = argument(node, "dim")
    size = shape(node.args[0])  # type: ignore[arg-type]
    dims = [d for d in ([dims] if isinstance(dims, int) else dims) if size[d] == 1]
    return g.op("Squeeze", g.raw(node), g.b.ints(*dims)) if dims else g.raw(node)


def _parts(g: Lowering, node: fx.Node, sizes: list[int], axis: int) -> list[str]:
    if len(sizes) == 1:
        return [g.raw(node)]
    names: list[str] = g.b.op("Split", g.raw(node), g.b.ints(*sizes), outputs=len(sizes), axis=axis)
    return names


@lowers(aten.unbind.int)
def _unbind(g: Lowering, node: fx.Node) -> Any:
    axis, source = argument(node, "dim"), g.raw(node)
    count = shape(node.args[0])[axis]  # type: ignore[arg-type]
    read = {u.args[1] for u in node.users}  # what nobody reads is not gathered
    indices = [g.b.constant(np.array(i, np.int64), "index") for i in range(count)]
    return [g.op("Gather", source, index, axis=axis) if i in read else "" for i, index in enumerate(indices)]


@lowers(aten.split_with_sizes.default)
def _split_with_sizes(g: Lowering, node: fx.Node) -> Any:
    return _parts(g, node, list(argument(node, "split_sizes")), argument(node, "dim"))


@lowers(aten.split.Tensor)
def _split(g: Lowering, node: fx.Node) -> Any:
    axis, each = argument(node, "dim"), argument(node, "split_size")
    total = shape(node.args[0])[axis]  # type: ignore[arg-type]
    return _parts(g, node, [min(each, total - i) for i in range(0, total, each)], axis)


@lowers(aten.chunk.default)
def _chunk(g: Lowering, node: fx.Node) -> Any:
    axis = argument(node, "dim")
    total = shape(node.args[0])[axis]  # type: ignore[arg-type]
    each = -(-total // argument(node, "chunks"))
    return _parts(g, node, [min(each, total - i) for i in range(0, total, each)], axis)


@lowers(operator.getitem)
def _getitem(g: Lowering, node: fx.Node) -> Any:
    return g.raw(node)[node.args[1]]


@lowers(aten.select.int)
def _select(g: Lowering, node: fx.Node) -> Any:
    index = g.b.constant(np.array(argument(node, "index"), np.int64), "index")
    return g.op("Gather", g.raw(node), index, axis=argument(node, "dim"))


@lowers(aten.slice.Tensor)
def _slice(g: Lowering, node: fx.Node) -> Any:
    start, end = argument(node, "start") or 0, argument(node, "end")
    end = np.iinfo(np.int64).max if end is None else end
    bounds = [start, end, argument(node, "dim"), argument(node, "step") or 1]
    names = [g.b.ints(v) for v in bounds]
    return g.op("Slice", g.raw(node), *names)


@lowers(aten.expand.default)
def _expand(g: Lowering, node: fx.Node) -> Any:
    wanted = [1 if s == -1 else s for s in argument(node, "size")]
    if not any(isinstance(s, fx.Node) for s in wanted):
        return g.op("Expand", g.raw(node), g.b.ints(*wanted))
    parts = [g.value(s) if isinstance(s, fx.Node) else g.b.ints(s) for s in wanted]
    return g.op("Expand", g.raw(node), g.op("Concat", *parts, axis=0))


@lowers(aten.repeat.default)
def _repeat(g: Lowering, node: fx.Node) -> Any:
    times = argument(node, "repeats")
    x, missing = g.raw(node), len(times) - len(shape(node.args[0]))  # type: ignore[arg-type]
    if missing:
        x = g.op("Unsqueeze", x, g.b.ints(*range(missing)))
    if not any(isinstance(t, fx.Node) for t in times):
        return g.op("Tile", x, g.b.ints(*times))
    return g.op(
        "Tile", x, g.op("Concat", *(g.value(t) if isinstance(t, fx.Node) else g.b.ints(t) for t in times), axis=0)
    )


@lowers(aten.index_select.default)
def _index_select(g: Lowering, node: fx.Node) -> Any:
    return g.op("Gather", g.raw(node), g.value(argument(node, "index")), axis=argument(node, "dim"))


@lowers(aten.roll.default)
def _roll(g: Lowering, node: fx.Node) -> Any:
    out, size = g.raw(node), shape(node)
    for shift, axis in zip(argument(node, "shifts"), argument(node, "dims"), strict=True):
        cut = -shift % size[axis]
        if cut:
            ax, end = g.b.ints(axis), g.b.ints(np.iinfo(np.int64).max)
            tail = g.op("Slice", out, g.b.ints(cut), end, ax)
            out = g.op("Concat", tail, g.op("Slice", out, g.b.ints(0), g.b.ints(cut), ax), axis=axis)
    return out


@lowers(aten.flip.default)
def _flip(g: Lowering, node: fx.Node) -> Any:
    dims = argument(node, "dims")
    minus = [-1] * len(dims)
    limits = g.b.ints(*[np.iinfo(np.int64).min] * len(dims))
    return g.op("Slice", g.raw(node), g.b.ints(*minus), limits, g.b.ints(*dims), g.b.ints(*minus))


@lowers(aten.pixel_shuffle.default)
def _pixel_shuffle(g: Lowering, node: fx.Node) -> Any:
    return g.op("DepthToSpace", g.raw(node), blocksize=argument(node, "upscale_factor"), mode="CRD")
