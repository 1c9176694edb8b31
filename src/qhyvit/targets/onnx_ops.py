"""How each ATen operator is written in ONNX. A new operator is one function with a `lowers` line."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto
from torch import fx

from qhyvit.errors import TargetError
from qhyvit.graph.ops import argument, aten, shape

if TYPE_CHECKING:
    from qhyvit.targets.onnx_lowering import Lowering

Lower = Callable[["Lowering", fx.Node], Any]
LOWERINGS: dict[Any, Lower] = {}

_UNARY = {
    "abs": "Abs",
    "atan": "Atan",
    "bitwise_not": "Not",
    "ceil": "Ceil",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "hardswish": "HardSwish",
    "log": "Log",
    "logical_not": "Not",
    "mish": "Mish",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "relu": "Relu",
    "round": "Round",
    "sigmoid": "Sigmoid",
    "selu": "Selu",
    "sign": "Sign",
    "sin": "Sin",
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
    "clamp_max.default": "Min",
    "clamp_min.default": "Max",
    "pow.Scalar": "Pow",
    "gt.Scalar": "Greater",
    "gt.Tensor": "Greater",
    "ge.Scalar": "GreaterOrEqual",
    "ge.Tensor": "GreaterOrEqual",
    "lt.Scalar": "Less",
    "lt.Tensor": "Less",
    "le.Scalar": "LessOrEqual",
    "le.Tensor": "LessOrEqual",
}


def lowers(*targets: Any) -> Callable[[Lower], Lower]:
    """Register a function for ATen overloads."""

    def enter(function: Lower) -> Lower:
        LOWERINGS.update(dict.fromkeys(targets, function))
        return function

    return enter


def _register_elementwise() -> None:
    for name, kind in _UNARY.items():
        LOWERINGS[getattr(aten, name).default] = _unary(kind)
    for name, kind in _BINARY.items():
        base, overload = name.split(".")
        LOWERINGS[getattr(getattr(aten, base), overload)] = _binary(kind)


def _unary(kind: str) -> Lower:
    return lambda g, node: g.op(kind, g.x(node, 0))


def _binary(kind: str) -> Lower:
    return lambda g, node: g.op(kind, g.x(node, 0), g.x(node, 1))


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


@lowers(aten.celu.default)
def _celu(g: Lowering, node: fx.Node) -> Any:
    return g.op("Celu", g.x(node, 0), alpha=float(argument(node, "alpha")))


@lowers(aten.softplus.default)
def _softplus(g: Lowering, node: fx.Node) -> Any:
    """softplus(βx)/β; beyond the threshold torch gives x itself, from which it differs by less than float32 shows."""
    beta, x = float(argument(node, "beta")), g.x(node, 0)
    if beta == 1:
        return g.op("Softplus", x)
    return g.op("Div", g.op("Softplus", g.op("Mul", x, g.b.number(beta))), g.b.number(beta))


@lowers(aten.log_sigmoid.default)
def _log_sigmoid(g: Lowering, node: fx.Node) -> Any:
    return g.op("Neg", g.op("Softplus", g.op("Neg", g.x(node, 0))))


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


@lowers(aten.cat.default)
def _cat(g: Lowering, node: fx.Node) -> Any:
    return g.op("Concat", *(g.operand(node, part) for part in argument(node, "tensors")), axis=argument(node, "dim"))


@lowers(aten.stack.default)
def _stack(g: Lowering, node: fx.Node) -> Any:
    axis = argument(node, "dim")
    axes = g.b.ints(axis)
    parts = [g.op("Unsqueeze", g.operand(node, part), axes) for part in argument(node, "tensors")]
    return g.op("Concat", *parts, axis=axis)


@lowers(aten.where.self)
def _where(g: Lowering, node: fx.Node) -> Any:
    return g.op("Where", g.x(node, 0), g.x(node, 1), g.x(node, 2))


@lowers(aten._to_copy.default, aten.to.dtype, aten.type_as.default)
def _cast(g: Lowering, node: fx.Node) -> Any:
    if not node.meta["dtype"].is_floating_point:
        raise TargetError(f"{node.meta.get('module')}: a cast to {node.meta['dtype']} has no ONNX form here.")
    return g.op("Cast", g.x(node, 0), to=TensorProto.FLOAT)


@lowers(aten.cumsum.default)
def _cumsum(g: Lowering, node: fx.Node) -> Any:
    return g.op("CumSum", g.x(node, 0), g.b.constant(np.array(argument(node, "dim"), np.int64), "axis"))


@lowers(aten.full.default)
def _full(g: Lowering, node: fx.Node) -> Any:
    value = g.b.number(float(argument(node, "fill_value")))
    sizes = [g.value(s) if isinstance(s, fx.Node) else g.b.ints(s) for s in argument(node, "size")]
    return g.op("Expand", value, g.op("Concat", *sizes, axis=0))


@lowers(aten.sym_size.int)
def _sym_size(g: Lowering, node: fx.Node) -> Any:
    if argument(node, "dim") != 0:
        raise TargetError("only the batch dimension may be free.")
    return g.batch_size(node.args[0])


def _size_arithmetic(kind: str) -> Lower:
    """On sizes, which are positive; so ONNX's truncating division is Python's floor division."""

    def lower(g: Lowering, node: fx.Node) -> Any:
        return g.op(kind, *(g.value(a) if isinstance(a, fx.Node) else g.b.ints(a) for a in node.args))  # type: ignore[arg-type]

    return lower


LOWERINGS[operator.mul] = _size_arithmetic("Mul")
LOWERINGS[operator.add] = _size_arithmetic("Add")
LOWERINGS[operator.sub] = _size_arithmetic("Sub")
LOWERINGS[operator.floordiv] = _size_arithmetic("Div")
