"""How each ATen operator is written in ONNX. A new operator is one function with a `lowers` line."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto
from torch import fx

from qhyvit.errors import TargetError
from qhyvit.graph.ops import argument, as_list, aten, shape

if TYPE_CHECKING:
    from qhyvit.targets.onnx_lowering import Lowering

Lower = Callable[["Lowering", fx.Node], Any]
LOWERINGS: dict[Any, Lower] = {}

_UNARY = {
    "abs": "Abs",
    "ceil": "Ceil",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "hardswish": "HardSwish",
    "log": "Log",
    "mish": "Mish",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "relu": "Relu",
    "round": "Round",
    "sigmoid": "Sigmoid",
    "sign": "Sign",
    "sin": "Sin",
    "softplus": "Softplus",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}
_BINARY = {
    "add.Tensor": "Add",
    "sub.Tensor": "Sub",
    "mul.Tensor": "Mul",
    "div.Tensor": "Div",
    "maximum.default": "Max",
    "minimum.default": "Min",
    "pow.Tensor_Scalar": "Pow",
    "pow.Tensor_Tensor": "Pow",
    "add.Scalar": "Add",
    "sub.Scalar": "Sub",
    "mul.Scalar": "Mul",
    "div.Scalar": "Div",
    "gt.Scalar": "Greater",
    "lt.Scalar": "Less",
}


def lowers(*targets: Any) -> Callable[[Lower], Lower]:
    """Register a function for ATen overloads."""

    def enter(function: Lower) -> Lower:
        LOWERINGS.update(dict.fromkeys(targets, function))
        return function

    return enter


def _register_elementwise() -> None:
    for name, kind in _UNARY.items():
        LOWERINGS[getattr(aten, name).default] = lambda g, n, kind=kind: g.op(kind, g.x(n, 0))
    for name, kind in _BINARY.items():
        base, overload = name.split(".")
        LOWERINGS[getattr(getattr(aten, base), overload)] = lambda g, n, kind=kind: _binary(g, n, kind)


def _binary(g: Lowering, node: fx.Node, kind: str) -> Any:
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
        raise TargetError(f"{node.meta.get('module')}: {node.target} with {dict(node.kwargs)} has no ONNX form.")
    return g.op(kind, g.x(node, 0), g.x(node, 1))


_register_elementwise()


@lowers(aten.silu.default)
def _silu(g: Lowering, node: fx.Node) -> Any:
    """x·sigmoid(x). ONNX Runtime fuses the pair by itself, but not behind a DequantizeLinear, which it duplicates."""
    x = g.x(node, 0)
    if g.is_coded(node):
        return g.op("QuickGelu", x, domain="com.microsoft", alpha=1.0)
    return g.op("Mul", x, g.op("Sigmoid", x))


@lowers(aten.gelu.default)
def _gelu(g: Lowering, node: fx.Node) -> Any:
    return g.op("Gelu", g.x(node, 0), approximate=argument(node, "approximate"))


@lowers(aten.rsqrt.default)
def _rsqrt(g: Lowering, node: fx.Node) -> Any:
    return g.op("Reciprocal", g.op("Sqrt", g.x(node, 0)))


@lowers(aten.hardsigmoid.default)
def _hardsigmoid(g: Lowering, node: fx.Node) -> Any:
    return g.op("HardSigmoid", g.x(node, 0), alpha=1 / 6, beta=0.5)


@lowers(aten.relu6.default)
def _relu6(g: Lowering, node: fx.Node) -> Any:
    return g.op("Clip", g.x(node, 0), g.b.number(0), g.b.number(6))


@lowers(aten.hardtanh.default, aten.clamp.default)
def _clamp(g: Lowering, node: fx.Node) -> Any:
    low, high = (
        (argument(node, "min_val"), argument(node, "max_val"))
        if node.target == aten.hardtanh.default
        else (argument(node, "min"), argument(node, "max"))
    )
    return g.op("Clip", g.x(node, 0), *(g.b.number(v) if v is not None else "" for v in (low, high)))


@lowers(aten.leaky_relu.default)
def _leaky_relu(g: Lowering, node: fx.Node) -> Any:
    return g.op("LeakyRelu", g.x(node, 0), alpha=float(argument(node, "negative_slope")))


@lowers(aten.elu.default)
def _elu(g: Lowering, node: fx.Node) -> Any:
    return g.op("Elu", g.x(node, 0), alpha=float(argument(node, "alpha")))


@lowers(aten.prelu.default)
def _prelu(g: Lowering, node: fx.Node) -> Any:
    slope = g.op("Unsqueeze", g.x(node, 1), g.b.ints(*range(1, len(shape(node)) - 1)))
    return g.op("PRelu", g.x(node, 0), slope)


@lowers(aten.softmax.int)
def _softmax(g: Lowering, node: fx.Node) -> Any:
    return g.op("Softmax", g.x(node, 0), axis=argument(node, "dim"))


@lowers(aten.log_softmax.int)
def _log_softmax(g: Lowering, node: fx.Node) -> Any:
    return g.op("LogSoftmax", g.x(node, 0), axis=argument(node, "dim"))


@lowers(aten.matmul.default)
def _matmul(g: Lowering, node: fx.Node) -> Any:
    return g.op("MatMul", g.x(node, 0), g.x(node, 1))


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


@lowers(aten.adaptive_avg_pool2d.default)
def _adaptive_pool(g: Lowering, node: fx.Node) -> Any:
    size, target = shape(node.args[0])[2:], shape(node)[2:]  # type: ignore[arg-type]
    if tuple(target) == (1, 1):
        return g.op("GlobalAveragePool", g.x(node, 0))
    if any(s % t for s, t in zip(size, target, strict=True)):
        raise TargetError(f"{node.meta.get('module')}: adaptive pooling from {size} to {target} has no ONNX form.")
    kernel = [s // t for s, t in zip(size, target, strict=True)]
    return g.op("AveragePool", g.x(node, 0), kernel_shape=kernel, strides=kernel)


def _pool_attributes(node: fx.Node) -> dict[str, Any]:
    kernel = as_list(argument(node, "kernel_size"), 2)
    stride = argument(node, "stride")
    pads = as_list(argument(node, "padding", 0), 2) * 2
    return {
        "kernel_shape": kernel,
        "strides": as_list(stride, 2) if stride else kernel,
        "pads": pads,
        "ceil_mode": int(bool(argument(node, "ceil_mode"))),
    }


@lowers(aten.avg_pool2d.default)
def _avg_pool(g: Lowering, node: fx.Node) -> Any:
    if argument(node, "divisor_override") is not None:
        raise TargetError(f"{node.meta.get('module')}: average pooling with a divisor of its own has no ONNX form.")
    include = int(bool(argument(node, "count_include_pad")))
    return g.op("AveragePool", g.x(node, 0), count_include_pad=include, **_pool_attributes(node))


@lowers(aten.max_pool2d.default)
def _max_pool(g: Lowering, node: fx.Node) -> Any:
    dilations = as_list(argument(node, "dilation", 1), 2)
    return g.op("MaxPool", g.x(node, 0), dilations=dilations, **_pool_attributes(node))


@lowers(aten.cat.default)
def _cat(g: Lowering, node: fx.Node) -> Any:
    return g.op("Concat", *(g.operand(node, part) for part in argument(node, "tensors")), axis=argument(node, "dim"))


@lowers(aten.stack.default)
def _stack(g: Lowering, node: fx.Node) -> Any:
    axis = argument(node, "dim")
    axes = g.b.ints(axis)
    parts = [g.op("Unsqueeze", g.operand(node, part), axes) for part in argument(node, "tensors")]
    return g.op("Concat", *parts, axis=axis)


def _resize(mode: str) -> Lower:
    def lower(g: Lowering, node: fx.Node) -> Any:
        corners = bool(argument(node, "align_corners")) if mode != "nearest" else False
        coordinates = "align_corners" if corners else ("asymmetric" if mode == "nearest" else "pytorch_half_pixel")
        extra: dict[str, Any] = {"nearest_mode": "floor"} if mode == "nearest" else {}
        if mode == "cubic":
            extra["cubic_coeff_a"] = -0.75
        sizes = g.op("Concat", g.batch_size(node.args[0]), g.b.ints(*shape(node)[1:]), axis=0)
        return g.op(
            "Resize", g.x(node, 0), "", "", sizes, mode=mode, coordinate_transformation_mode=coordinates, **extra
        )

    return lower


for _overload, _mode in (
    (aten.upsample_bilinear2d.vec, "linear"),
    (aten.upsample_bilinear2d.default, "linear"),
    (aten.upsample_nearest2d.vec, "nearest"),
    (aten.upsample_nearest2d.default, "nearest"),
    (aten.upsample_bicubic2d.vec, "cubic"),
    (aten.upsample_bicubic2d.default, "cubic"),
):
    LOWERINGS[_overload] = _resize(_mode)


@lowers(aten.constant_pad_nd.default, aten.pad.default)
def _pad(g: Lowering, node: fx.Node) -> Any:
    pads = list(argument(node, "pad"))
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    mode = modes[argument(node, "mode") if node.target == aten.pad.default else "constant"]
    rank = len(shape(node))
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    fill = g.b.number(argument(node, "value") or 0.0)
    return g.op("Pad", g.x(node, 0), g.b.ints(*before, *after), fill, mode=mode)


@lowers(aten.where.self)
def _where(g: Lowering, node: fx.Node) -> Any:
    return g.op("Where", g.x(node, 0), g.x(node, 1), g.x(node, 2))


@lowers(aten._to_copy.default, aten.to.dtype)
def _cast(g: Lowering, node: fx.Node) -> Any:
    if not node.meta["dtype"].is_floating_point:
        raise TargetError(f"{node.meta.get('module')}: a cast to {node.meta['dtype']} has no ONNX form here.")
    return g.op("Cast", g.x(node, 0), to=TensorProto.FLOAT)


@lowers(aten.sym_size.int)
def _sym_size(g: Lowering, node: fx.Node) -> Any:
    if argument(node, "dim") != 0:
        raise TargetError("only the batch dimension may be free.")
    return g.batch_size(node.args[0])


@lowers(operator.mul)
def _size_product(g: Lowering, node: fx.Node) -> Any:
    sides = [g.value(a) if isinstance(a, fx.Node) else g.b.ints(a) for a in node.args]
    return g.op("Mul", *sides)
