"""Building an ONNX graph from a captured graph: values, constants, and Q/DQ around what is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from qhyvit.errors import TargetError
from qhyvit.quantizers.uniform import UniformAffine

# QuantizeLinear and DequantizeLinear take int4 and uint16 from opset 21 on, and Gelu is one operator from 20 on.
OPSET = 21
IR_VERSION = 10


@dataclass(frozen=True)
class Value:
    """A tensor of the ONNX graph.

    Attributes:
        name: in the ONNX graph.
        quantizer: given where the tensor holds integer codes; None for floats.
        parameters: names of scale and zero point.
        axis: channel axis of a per-channel quantizer.
        flat: whether all axes but the last are stored as one (positions × channels).
    """

    name: str
    quantizer: UniformAffine | None = None
    parameters: tuple[str, str] = ("", "")
    axis: int | None = None
    flat: bool = False


class Builder:
    """Collects nodes and constants; names are taken from the captured graph, so the same graph gives the same file."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._taken: set[str] = set()
        self._scalars: dict[tuple[str, bytes], str] = {}
        self.scope = ""

    def fresh(self, hint: str) -> str:
        """A name not used before."""
        name, n = hint, 1
        while name in self._taken:
            n += 1
            name = f"{hint}_{n}"
        self._taken.add(name)
        return name

    def constant(self, value: NDArray[Any] | Tensor, hint: str = "c") -> str:
        """An initializer; small ones with equal contents are shared."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        key = (f"{array.dtype}{array.shape}", array.tobytes()) if array.size <= 8 else None
        if key is not None and key in self._scalars:
            return self._scalars[key]
        name = self.fresh(hint)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        if key is not None:
            self._scalars[key] = name
        return name

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(np.array(values, dtype=np.int64), "dims")

    def number(self, value: float) -> str:
        """A constant float32 scalar."""
        return self.constant(np.array(value, dtype=np.float32), "number")

    def op(self, kind: str, *inputs: str, outputs: int = 1, hint: str | None = None, **attributes: Any) -> Any:
        """Append one node; returns its output name, or a list where `outputs` is above 1."""
        names = [self.fresh(hint or f"{self.scope}_{kind}") for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def quantize(self, name: str, quantizer: UniformAffine, axis: int | None, flat: bool = False) -> Value:
        """Codes of a float tensor: QuantizeLinear, and a Clip on the codes where the type has more of them."""
        dtype = _code_type(quantizer)
        scale = self.constant(quantizer.scale.float(), "scale")
        zero = self.constant(quantizer.zero_point.cpu().numpy().astype(dtype), "zero_point")
        axes: dict[str, Any] = {} if quantizer.axis is None else {"axis": axis}
        codes = self.op("QuantizeLinear", name, scale, zero, **axes)
        info = np.iinfo(dtype)
        if (info.min, info.max) != (quantizer.quant_min, quantizer.quant_max):
            bounds = [self.constant(np.array(v, dtype)) for v in (quantizer.quant_min, quantizer.quant_max)]
            codes = self.op("Clip", codes, *bounds)
        return Value(codes, quantizer, (scale, zero), None if quantizer.axis is None else axis, flat)

    def dequantize(self, value: Value) -> str:
        """A float view of codes; one DequantizeLinear for each reader, as runtimes fuse each with its operator."""
        axes: dict[str, Any] = {} if value.axis is None else {"axis": value.axis}
        name: str = self.op("DequantizeLinear", value.name, *value.parameters, **axes)
        return name

    def weight(self, codes: Tensor, quantizer: UniformAffine, axis: int, *, unsigned: bool, hint: str) -> str:
        """A float view of an integer weight: int8 (or uint8 with zero point 128), int4 stored packed.

        Args:
            codes: int32.
            quantizer: its scale and zero point, () or (C,).
            axis: the channel axis of `codes`.
            unsigned: store 8-bit codes + 128 as uint8, for processors whose signed products saturate; narrower ones
                do not: two products of 255 and -64 fit 16 bits.
            hint: name.
        """
        unsigned = unsigned and quantizer.bits == 8
        array = codes.cpu().numpy()
        zero = quantizer.zero_point.cpu().numpy()
        axes: dict[str, Any] = {} if quantizer.axis is None else {"axis": axis}
        if quantizer.bits <= 4 and not unsigned:
            name = self.fresh(hint)
            self.initializers.append(_packed(array, name))
            name = self.op("Cast", name, to=TensorProto.INT8)  # folded on loading, so that int8 kernels take it
            dtype: np.dtype[Any] = np.dtype(np.int8)
            shift = 0
        else:
            dtype, shift = (np.dtype(np.uint8), 128) if unsigned else (np.dtype(np.int8), 0)
            name = self.constant((array + shift).astype(dtype), hint)
        scale = self.constant(quantizer.scale.float(), "scale")
        zero_point = self.constant((zero + shift).astype(dtype), "zero_point")
        out: str = self.op("DequantizeLinear", name, scale, zero_point, **axes)
        return out

    def bias(self, codes: Tensor, scale: Tensor, hint: str) -> str:
        """A float view of an int32 bias (C_out,) with one scale per channel."""
        name = self.constant(codes.to(torch.int32), hint)
        out: str = self.op("DequantizeLinear", name, self.constant(scale.float(), "scale"), axis=0)
        return out

    def model(self, inputs: list[Any], outputs: list[Any], producer: str) -> onnx.ModelProto:
        """The finished, checked model."""
        domains = {node.domain for node in self.nodes if node.domain}
        opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
        graph = helper.make_graph(self.nodes, "qhyvit", inputs, outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=producer)
        onnx.checker.check_model(model, full_check=True)
        return model


def _code_type(quantizer: UniformAffine) -> np.dtype[Any]:
    if quantizer.bits <= 8:
        return np.dtype(np.int8 if quantizer.signed else np.uint8)
    return np.dtype(np.int16 if quantizer.signed else np.uint16)


def _packed(array: NDArray[np.int32], name: str) -> onnx.TensorProto:
    """An int4 tensor, two codes a byte, the first in the low half. (`make_tensor` spends one and a half.)"""
    nibbles = np.append(array.flatten(), [0] * (array.size % 2)).astype(np.uint8) & 15
    return helper.make_tensor(
        name, TensorProto.INT4, array.shape, (nibbles[::2] | nibbles[1::2] << 4).tobytes(), raw=True
    )


def no_lowering(node: fx.Node, target: str) -> TargetError:
    """The sentence for an operator that a target does not know."""
    return TargetError(
        f"{node.meta.get('module') or 'the model'}: operator {node.target} has no ONNX form in target {target}; "
        "add one to targets/onnx_ops.py."
    )
