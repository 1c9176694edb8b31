"""Constant factors and offsets folded into the weights next to them.

Covers BatchNorm (as `plain_batch_norms` writes it), layer scale, the attention scale, and means of several heads. A
factor or offset goes up into the convolution or linear that makes the channels, through any layout change between; if
that is not possible, down into all that read them; a BatchNorm with neither becomes a depthwise 1×1 convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qhyvit.graph.channels import consumers, origin, per_channel
from qhyvit.graph.ops import (
    CONVOLUTIONS,
    add_constant,
    argument,
    as_list,
    aten,
    constant,
    insert,
    is_call,
    scalar,
    set_weight,
    shape,
    weight_of,
)


@dataclass(frozen=True)
class _Affine:
    """value = data · factor, or value = data + offset."""

    data: fx.Node
    factor: Tensor | None = None
    offset: Tensor | None = None


def fold_affines(graph: fx.GraphModule) -> int:
    """Fold what can be folded; returns the number of operators removed."""
    folded = 0
    for node in list(graph.graph.nodes):
        affine = _match(graph, node)
        if affine is None:
            continue
        if _fold_up(graph, node, affine) or _fold_down(graph, node, affine):
            node.replace_all_uses_with(affine.data)
            graph.graph.erase_node(node)
            folded += 1
        else:
            folded += _as_depthwise(graph, node)
    return folded


def _match(graph: fx.GraphModule, node: fx.Node) -> _Affine | None:
    """Read a node as an affine function of its one non-constant operand."""
    targets = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor})
    if not is_call(node, targets) or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    if node.target in {aten.mul.Tensor, aten.add.Tensor} and constant(graph, left) is not None:
        left, right = right, left
    if not isinstance(left, fx.Node) or left.op == "get_attr" or shape(left) != shape(node):
        return None
    dtype = node.meta["dtype"]
    if not dtype.is_floating_point:
        return None
    value = torch.tensor(right, dtype=dtype) if scalar(right) else constant(graph, right)
    if value is None or not value.dtype.is_floating_point:
        return None
    if node.target == aten.mul.Tensor:
        return _Affine(left, factor=value)
    if node.target == aten.div.Tensor:
        return _Affine(left, factor=1 / value)
    return _Affine(left, offset=value if node.target == aten.add.Tensor else -value)


def _fold_up(graph: fx.GraphModule, node: fx.Node, affine: _Affine) -> bool:
    found = origin(graph, affine.data)
    if found is None:
        return False
    producer, index = found
    weight, bias = weight_of(graph, producer)  # type: ignore[misc]
    channels = weight.shape[0]
    if affine.factor is not None:
        factor = per_channel(affine.factor, index, channels, 1.0)
        if factor is None:
            return False
        spread = factor.view(-1, *[1] * (weight.ndim - 1))
        set_weight(graph, producer, weight * spread, None if bias is None else bias * factor)
        return True
    assert affine.offset is not None
    offset = per_channel(affine.offset, index, channels, 0.0)
    if offset is None:
        return False
    set_weight(graph, producer, weight, offset if bias is None else bias + offset)
    return True


def _fold_down(graph: fx.GraphModule, node: fx.Node, affine: _Affine) -> bool:
    """Into every reader's input channels; an offset only where no zero padding stands between."""
    axis = _channel_axis(node, affine)
    readers = None if axis is None else consumers(graph, node, axis)
    if axis is None or readers is None:
        return False
    if affine.offset is not None and any(is_padded(reader) for reader, _ in readers):
        return False
    value = affine.factor if affine.factor is not None else affine.offset
    assert value is not None
    size = shape(node)
    flat = value.expand(size).movedim(axis, 0).reshape(size[axis], -1)[:, 0]
    for reader, index in readers:
        weight, bias = weight_of(graph, reader)  # type: ignore[misc]
        per_input = per_input_channel(flat[index], weight, argument(reader, "groups", 1) or 1)
        if affine.factor is not None:
            set_weight(graph, reader, weight * per_input, bias)
        else:
            shift = (weight * per_input).flatten(1).sum(1)
            set_weight(graph, reader, weight, shift if bias is None else bias + shift)
    return True


def _channel_axis(node: fx.Node, affine: _Affine) -> int | None:
    """The only axis along which the constant varies (axis 1 for a plain number)."""
    value = affine.factor if affine.factor is not None else affine.offset
    assert value is not None
    size = shape(node)
    padded = (1,) * (len(size) - value.ndim) + tuple(value.shape)
    varying = [i for i, n in enumerate(padded) if n > 1]
    if not varying:
        return 1 if len(size) > 1 else None
    return varying[0] if len(varying) == 1 and varying[0] > 0 else None


def per_input_channel(values: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Per-input-channel values (C_in,) in the shape of a weight (C_out, C_in / groups, 1, …)."""
    each = weight.shape[0] // groups
    rows = values.view(groups, -1).repeat_interleave(each, 0)
    return rows.view(weight.shape[0], -1, *[1] * (weight.ndim - 2))


def is_padded(node: fx.Node) -> bool:
    """Whether a layer reads zeros from outside its input."""
    return is_call(node, CONVOLUTIONS) and any(as_list(argument(node, "padding", 0), len(shape(node)) - 2))


def _as_depthwise(graph: fx.GraphModule, node: fx.Node) -> int:
    """x·a + b with constants per channel, which nothing could take, as a depthwise 1×1 convolution."""
    shift = _match(graph, node)
    if shift is None or shift.offset is None or not is_call(shift.data, aten.mul.Tensor) or len(shift.data.users) != 1:
        return 0
    scale = _match(graph, shift.data)
    channels = shape(node)[1] if len(shape(node)) == 4 else 0
    expected = (channels, 1, 1)
    if scale is None or scale.factor is None or scale.factor.shape != expected or shift.offset.shape != expected:
        return 0
    weight = add_constant(graph, f"{node.name}_weight", scale.factor.view(-1, 1, 1, 1), node)
    bias = add_constant(graph, f"{node.name}_bias", shift.offset.flatten(), node)
    new = insert(graph, node, aten.conv2d.default, scale.data, weight, bias, [1, 1], [0, 0], [1, 1], channels)
    node.replace_all_uses_with(new)
    return 1
