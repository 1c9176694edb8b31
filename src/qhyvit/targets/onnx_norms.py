"""ONNX forms of norms and reductions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from qhyvit.errors import TargetError
from qhyvit.graph.ops import argument, aten, shape
from qhyvit.targets.onnx_ops import LOWERINGS, Lower, lowers

if TYPE_CHECKING:
    from qhyvit.targets.onnx_lowering import Lowering


@lowers(aten.layer_norm.default)
def _layer_norm(g: Lowering, node: fx.Node) -> Any:
    size = argument(node, "normalized_shape")
    weight, bias = argument(node, "weight"), argument(node, "bias")
    scale = g.value(weight) if weight is not None else g.b.constant(np.ones(size, np.float32))
    shift = [g.value(bias)] if bias is not None else []
    return g.op(
        "LayerNormalization", g.x(node, 0), scale, *shift, axis=-len(size), epsilon=float(argument(node, "eps"))
    )


@lowers(aten.group_norm.default)
def _group_norm(g: Lowering, node: fx.Node) -> Any:
    """A layer norm over each group, laid out flat; LayerNormalization is faster than InstanceNormalization."""
    groups, eps = argument(node, "num_groups"), float(argument(node, "eps"))
    size = shape(node)
    per_group = math.prod(size[1:]) // groups
    flat = g.op("Reshape", g.x(node, 0), g.b.ints(0, groups, per_group))
    normal = g.op("LayerNormalization", flat, g.b.constant(np.ones(per_group, np.float32)), axis=-1, epsilon=eps)
    out = g.op("Reshape", normal, g.b.ints(0, *size[1:]))
    for kind, name in (("Mul", "weight"), ("Add", "bias")):
        constant = argument(node, name)
        if constant is not None:
            value = g.tensor(constant).reshape(-1, *[1] * (len(size) - 2))
            out = g.op(kind, out, g.b.constant(value))
    return out


@lowers(aten.rms_norm.default)
def _rms_norm(g: Lowering, node: fx.Node) -> Any:
    size, eps = argument(node, "normalized_shape"), argument(node, "eps")
    x = g.x(node, 0)
    axes = g.b.ints(*range(-len(size), 0))
    mean = g.op("ReduceMean", g.op("Mul", x, x), axes, keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.b.number(eps if eps is not None else float(np.finfo(np.float32).eps))))
    out = g.op("Div", x, root)
    weight = argument(node, "weight")
    return out if weight is None else g.op("Mul", out, g.value(weight))


def _reduce(kind: str) -> Lower:
    def lower(g: Lowering, node: fx.Node) -> Any:
        dims = argument(node, "dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(len(shape(node.args[0]))))  # type: ignore[arg-type]
        return g.op(kind, g.x(node, 0), g.b.ints(*dims), keepdims=int(bool(argument(node, "keepdim"))))

    return lower


LOWERINGS[aten.mean.dim] = _reduce("ReduceMean")
LOWERINGS[aten.sum.dim_IntList] = _reduce("ReduceSum")
LOWERINGS[aten.amax.default] = _reduce("ReduceMax")
LOWERINGS[aten.amin.default] = _reduce("ReduceMin")


@lowers(aten.linalg_vector_norm.default)
def _vector_norm(g: Lowering, node: fx.Node) -> Any:
    kind = {1: "ReduceL1", 2: "ReduceL2"}.get(argument(node, "ord"))
    if kind is None or argument(node, "dim") is None:
        raise TargetError(f"{node.meta.get('module')}: only 1- and 2-norms over given axes have an ONNX form.")
    keep = int(bool(argument(node, "keepdim")))
    return g.op(kind, g.x(node, 0), g.b.ints(*argument(node, "dim")), keepdims=keep)


@lowers(aten.var.correction)
def _var(g: Lowering, node: fx.Node) -> Any:
    dims, correction = argument(node, "dim"), argument(node, "correction")
    x, axes = g.x(node, 0), g.b.ints(*dims)
    centred = g.op("Sub", x, g.op("ReduceMean", x, axes, keepdims=1))
    count = math.prod(shape(node.args[0])[d] for d in dims)  # type: ignore[arg-type]
    divisor = g.b.number(count - (1 if correction is None else correction))
    total = g.op("ReduceSum", g.op("Mul", centred, centred), axes, keepdims=int(bool(argument(node, "keepdim"))))
    return g.op("Div", total, divisor)
