"""A quantized model as an ONNX graph in QDQ form.

Integer codes are made once, right after the operator whose output they are; layout operators then move the codes, and
each operator that computes gets a DequantizeLinear of its own, the form in which runtimes find integer kernels. A
linear over positions is one Gemm on positions × channels, and what follows it position by position stays in that flat
form. Why not torch.onnx.export: it takes many times as long and writes linears and Q/DQ in a form that is not fused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx

from qhyvit.graph.ops import (
    LAYOUT,
    TRANSPOSED,
    WEIGHTED,
    argument,
    as_list,
    aten,
    constant,
    is_call,
    shape,
    weight_of,
)
from qhyvit.graph.shapes import batch_axes
from qhyvit.quantized import QuantizedModel, integer_bias
from qhyvit.targets import onnx_layout, onnx_norms, onnx_spatial  # noqa: F401  (they register lowerings)
from qhyvit.targets.onnx_builder import Builder, Value, no_lowering
from qhyvit.targets.onnx_ops import LOWERINGS

PRODUCER = "qhyvit"

# Elementwise operators that may be computed on the flat form.
POSITIONWISE = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.hardswish.default,
        aten.sigmoid.default,
        aten.tanh.default,
    }
)


class Lowering:
    """The state of one export; lowering functions read operands and add nodes through it.

    Args:
        model: what to export.
        quantized: False writes the float graph, for comparison.
        unsigned_weights: store weights as uint8.
        target: the target's name, for messages.
    """

    def __init__(self, model: QuantizedModel, *, quantized: bool, unsigned_weights: bool, target: str) -> None:
        self.model, self.graph, self.target = model, model.graph, target
        self.unsigned_weights = unsigned_weights
        self.b = Builder()
        self.values: dict[fx.Node, Any] = {}  # Value, or a list of Value for operators with several outputs
        self.codes: dict[fx.Node, Value] = {}  # what the readers of a site see
        self._reshaped: dict[tuple[str, bool], str] = {}
        self._is_flat = False  # whether the node at hand is lowered in flat form
        self._batch_axes = batch_axes(self.graph)
        sites = model.sites.activations if quantized else ()
        self.sites = {s.value: s for s in sites}
        self.weights = {s.node for s in model.sites.weights} if quantized else set()

    # What lowering functions use --------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append one node with one output."""
        name: str = self.b.op(kind, *inputs, **attributes)
        return name

    def x(self, node: fx.Node, position: int) -> str:
        """A float operand: a number becomes a constant, codes are dequantized for this reader."""
        operand = node.args[position] if position < len(node.args) else None
        if isinstance(operand, fx.Node):
            return self.operand(node, operand)
        return self.b.number(float(operand))  # type: ignore[arg-type]

    def operand(self, node: fx.Node, operand: fx.Node) -> str:
        """A tensor operand as `node` sees it, float."""
        value = self._seen(node, operand)
        if operand.op != "get_attr":
            value = self._flat(value, operand) if self._is_flat else self._full(value, operand)
        return self.b.dequantize(value) if value.quantizer is not None else value.name

    def raw(self, node: fx.Node, *, flat: bool = False) -> Any:
        """The first operand as it is, codes or float; a list where it is the output of a split.

        Args:
            node: the reader.
            flat: whether the flat form will do.
        """
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        value = self._seen(node, operand)
        if isinstance(value, list):
            return [v.name for v in value]
        return value.name if flat else self._full(value, operand).name

    def is_coded(self, node: fx.Node) -> bool:
        """Whether the first operand holds integer codes."""
        return self._seen(node, node.args[0]).quantizer is not None  # type: ignore[arg-type]

    def value(self, node: fx.Node) -> str:
        """The float tensor of any node."""
        return self.operand(node, node) if node.op != "get_attr" else self._constant(node).name

    def tensor(self, node: fx.Node) -> Tensor:
        """The value of a constant node."""
        value = constant(self.graph, node)
        assert value is not None
        return value

    def batch_size(self, node: Any) -> str:
        """The free batch dimension of a tensor as an int64 vector of one."""
        name: str = self.b.op("Shape", self.value(node), start=0, end=1)
        return name

    # ------------------------------------------------------------------------------------------------------------

    def run(self) -> onnx.ModelProto:
        """Lower every node, in order.

        Raises:
            TargetError: naming the operator that has no ONNX form.
        """
        inputs, outputs = [], []
        for node in self.graph.graph.nodes:
            self.b.scope = node.name
            if node.op == "placeholder":
                size = ["N", *shape(node)[1:]]
                inputs.append(helper.make_tensor_value_info(self.b.fresh(node.name), TensorProto.FLOAT, size))
                self._store(node, Value(node.name))
            elif node.op == "output":
                self._is_flat = False
                logits = node.args[0]
                name = self.b.op("Identity", self.value(logits), hint="logits")
                size = ["N", *shape(logits)[1:]]
                outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, size))
            elif node.op == "call_function":
                self._store(node, self._lower(node))
        return self.b.model(inputs, outputs, PRODUCER)

    def _lower(self, node: fx.Node) -> Any:
        self._is_flat = False
        if is_call(node, WEIGHTED | TRANSPOSED):
            return self._weighted(node)
        lowering = LOWERINGS.get(node.target)
        if lowering is None:
            raise no_lowering(node, self.target)
        self._is_flat = self._stays_flat(node)
        result = lowering(self, node)
        if not is_call(node, LAYOUT):
            return Value(result, flat=self._is_flat)
        source = self._seen(node, node.args[0])  # type: ignore[arg-type]
        like = source[0] if isinstance(source, list) else source
        wrap = [Value(name, like.quantizer, like.parameters, like.axis) for name in _listed(result)]
        return wrap if isinstance(result, list) else wrap[0]

    def _seen(self, reader: fx.Node, operand: fx.Node) -> Any:
        if operand.op == "get_attr":
            return self._constant(operand)
        site = self.sites.get(operand.name)
        if site is not None and reader.name in site.readers:
            return self.codes[operand]
        return self.values[operand]

    def _constant(self, node: fx.Node) -> Value:
        if node not in self.values:
            tensor = self.tensor(node)
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            self.values[node] = Value(self.b.constant(tensor, str(node.target)))
        value: Value = self.values[node]
        return value

    def _store(self, node: fx.Node, value: Any) -> None:
        self.values[node] = value
        site = self.sites.get(node.name)
        if site is not None:
            quantizer = self.model.parameters.uniform(site.value)
            if quantizer.axis is not None:
                value = self._full(value, node)
            self.codes[node] = self.b.quantize(value.name, quantizer, quantizer.axis, value.flat)

    def _stays_flat(self, node: fx.Node) -> bool:
        """Whether to compute position by position on the flat form: an operand has it and no operand forbids it."""
        if node.target == aten.layer_norm.default:
            operands = [node.args[0]] if len(argument(node, "normalized_shape")) == 1 else []
        elif node.target in POSITIONWISE:
            operands = [a for a in node.args if isinstance(a, fx.Node)]
        else:
            return False
        if any(o.op == "get_attr" or shape(o) != shape(node) for o in operands if isinstance(o, fx.Node)):
            return False
        return any(self._seen(node, o).flat for o in operands if isinstance(o, fx.Node))

    def _flat(self, value: Value, node: fx.Node) -> Value:
        return value if value.flat or len(shape(node)) == 2 else self._reshape(value, True, [-1, shape(node)[-1]])

    def _full(self, value: Value, node: fx.Node) -> Value:
        return self._reshape(value, False, [-1, *shape(node)[1:]]) if value.flat else value

    def _reshape(self, value: Value, flat: bool, sizes: list[int]) -> Value:
        key = (value.name, flat)
        if key not in self._reshaped:
            self._reshaped[key] = self.op("Reshape", value.name, self.b.ints(*sizes))
        return replace(value, name=self._reshaped[key], flat=flat)

    def _weighted(self, node: fx.Node) -> Value:
        """Convolutions and linears."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        linear = is_call(node, aten.linear.default)
        x = self._seen(node, source)
        flat = linear and self._batch_axes.get(source) == 0  # the full form is found again from the other axes
        if source.op != "get_attr":
            x = self._flat(x, source) if flat else self._full(x, source)
        data = self.b.dequantize(x) if x.quantizer is not None else x.name
        weight, bias = self._weights(node, transpose=linear)
        operands = [data, weight] + ([bias] if bias else [])
        if not linear:
            transposed = is_call(node, TRANSPOSED)
            kind = "ConvTranspose" if transposed else "Conv"
            return Value(self.op(kind, *operands, **_conv_attributes(node, transposed)))
        if not flat:
            product = self.op("MatMul", data, weight)
            return Value(self.op("Add", product, bias) if bias else product)
        return Value(self.op("Gemm", *operands), flat=len(shape(node)) != 2)

    def _weights(self, node: fx.Node, transpose: bool) -> tuple[str, str | None]:
        """Names of weight and bias as float tensors, dequantized from integers where the layer is quantized."""
        found = weight_of(self.graph, node)
        if found is None:
            bias_node = argument(node, "bias")
            weight = self.operand(node, argument(node, "weight"))
            weight = self.op("Transpose", weight, perm=[1, 0]) if transpose else weight
            return weight, self.operand(node, bias_node) if bias_node is not None else None
        if node.name not in self.weights:
            weight_value = found[0].float().t().contiguous() if transpose else found[0].float()
            bias = None if found[1] is None else self.b.constant(found[1].float(), f"{node.name}_bias")
            return self.b.constant(weight_value, f"{node.name}_weight"), bias
        codes = self.model.codes(node.name)
        quantizer = self.model.parameters.weights[node.name]
        hint = f"{node.name}_weight"
        weight = self.b.weight(
            codes.t() if transpose else codes,
            quantizer,
            1 if transpose else 0,
            unsigned=self.unsigned_weights,
            hint=hint,
        )
        return weight, self._bias(node.name)

    def _bias(self, node: str) -> str | None:
        bias, scale = self.model.bias(node), self.model.bias_scale(node)
        if bias is None:
            return None
        if scale is None or not self.model.integer_bias:
            return self.b.constant(bias.float(), f"{node}_bias")
        codes = integer_bias(bias, scale)
        return self.b.bias(codes.double().to(torch.int32), scale, f"{node}_bias")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _conv_attributes(node: fx.Node, transposed: bool) -> dict[str, Any]:
    n = len(shape(node)) - 2
    attributes: dict[str, Any] = {
        "strides": as_list(argument(node, "stride", 1), n),
        "pads": as_list(argument(node, "padding", 0), n) * 2,
        "dilations": as_list(argument(node, "dilation", 1), n),
        "group": argument(node, "groups", 1) or 1,
    }
    if transposed:
        attributes["output_padding"] = as_list(argument(node, "output_padding", 0), n)
    return attributes
