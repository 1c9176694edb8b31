"""Shifting and scaling the channels of a value, exactly: x' = (x - m) / t for its readers, W·t and W·m in the layers.

With one scale per tensor on x', channel c of x has the scale t_c·s and the offset m_c: per-channel granularity, and no
zero point that overflows, on a runtime that knows neither. Where the producer is a convolution, linear or norm, m
and t disappear into it and cost nothing at run time; else one subtraction and one multiplication remain. An offset
before zero padding leaves an addition behind the layer that pads (`qhyvit.graph.undoing`). An offset may also pass
through attention, and through the addition before the next norm (post-norm transformers), which then takes it back
with its input. (Channel migration and shifting: Trio-ViT, arXiv 2405.03882; SmoothQuant, arXiv 2211.10438.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qhyvit.graph.affine import is_padded
from qhyvit.graph.channels import consumers
from qhyvit.graph.ops import (
    WEIGHTED,
    add_constant,
    argument,
    aten,
    channel_axis,
    constant,
    is_call,
    only_norms_read,
    set_weight,
    shape,
    weight_of,
)
from qhyvit.graph.undoing import undo


def foldable(graph: fx.GraphModule, value: fx.Node, axis: int, readers: Collection[str]) -> bool:
    """Whether factors and offsets of a value disappear into its producer: a layer or norm that nobody else reads."""
    if any(user.name not in readers for user in value.users):
        return False
    if is_call(value, WEIGHTED):
        return weight_of(graph, value) is not None and axis == channel_axis(value)
    if value.target == aten.layer_norm.default:
        return len(argument(value, "normalized_shape")) == 1 and axis == len(shape(value)) - 1
    return value.target == aten.group_norm.default and axis == 1


def shiftable(graph: fx.GraphModule, value: fx.Node, axis: int, readers: Collection[str]) -> bool:
    """Whether an offset costs nothing behind it: no layer there pads with zeros, which would have to become -m / t."""
    layers = consumers(graph, value, axis, readers)
    return layers is not None and not any(is_padded(layer) for layer, _ in layers)


@dataclass(frozen=True)
class Passage:
    """Users of a value that let an offset by channel pass, though no factor.

    Attributes:
        sums: additions of what is as large, read by norms alone: the offset is added again in front of these.
        attention: names of readers that lead to attention's keys or values.
    """

    sums: tuple[fx.Node, ...] = ()
    attention: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sums or self.attention)

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of all."""
        return (*(node.name for node in self.sums), *self.attention)


def passage(graph: fx.GraphModule, value: fx.Node, axis: int, readers: Collection[str]) -> Passage:
    """What lets offsets pass beside `readers`; empty if any other user of the value does not."""
    sums, attention = [], []
    for user in (u for u in value.users if u.name not in readers):
        if axis == len(shape(value)) - 1 and _is_sum(user, value) and only_norms_read(user):
            sums.append(user)
            continue
        layers = consumers(graph, value, axis, [user.name], offsets=True)
        if layers is None or any(is_padded(layer) for layer, _ in layers):
            return Passage()
        attention.append(user.name)
    return Passage(tuple(sums), tuple(attention))


def _is_sum(node: fx.Node, value: fx.Node) -> bool:
    operands = node.all_input_nodes
    plain = is_call(node, frozenset({aten.add.Tensor})) and not node.kwargs and len(operands) == 2
    return plain and shape(node) == shape(value)


def balance(
    graph: fx.GraphModule,
    value: fx.Node,
    axis: int,
    readers: Collection[str],
    factor: Tensor,
    offset: Tensor,
    beside: Passage = Passage(),
) -> fx.Node:
    """Rewrite the graph so that `readers` see (value - offset) / factor and the layers behind them undo it.

    Args:
        graph: float graph, changed in place; its output stays the same.
        value: the node whose channels are changed.
        axis: its channel axis.
        readers: names of direct readers that shall see the changed value.
        factor: t > 0, (C,).
        offset: m, (C,).
        beside: `passage`, where that is to read the changed value too; t is 1 then.

    Returns:
        The node that now holds the changed value; `value` itself where all was folded into its producer.

    Raises:
        ValueError: if a reader leads to something else than layers.
    """
    layers = consumers(graph, value, axis, [*readers, *beside.attention], offsets=bool(beside))
    if layers is None:
        raise ValueError(f"{value.name} cannot be balanced")
    for layer, index in layers:
        undo(graph, layer, factor[index], offset[index])
    for node in beside.sums:
        _inserted(graph, node, aten.add.Tensor, offset, list(node.users))
    changed = value
    if foldable(graph, value, axis, [*readers, *beside.readers]):
        _into_producer(graph, value, factor, offset)
    else:
        changed = _explicit(graph, value, axis, readers, factor, offset)
    graph.recompile()
    return changed


def _into_producer(graph: fx.GraphModule, value: fx.Node, factor: Tensor, offset: Tensor) -> None:
    if is_call(value, WEIGHTED):
        weight, bias = weight_of(graph, value)  # type: ignore[misc]
        bias = torch.zeros_like(offset) if bias is None else bias
        spread = factor.view(-1, *[1] * (weight.ndim - 1))
        set_weight(graph, value, weight / spread, (bias - offset) / factor)
        return
    gamma, beta = (constant(graph, argument(value, name)) for name in ("weight", "bias"))
    gamma = torch.ones_like(factor) if gamma is None else gamma
    beta = torch.zeros_like(offset) if beta is None else beta
    set_weight(graph, value, gamma / factor, (beta - offset) / factor)


def _explicit(
    graph: fx.GraphModule, value: fx.Node, axis: int, readers: Collection[str], factor: Tensor, offset: Tensor
) -> fx.Node:
    size = [1] * (len(shape(value)) - 1)
    size[axis - 1] = -1
    chosen, out = [user for user in value.users if user.name in readers], value
    for target, change, neutral in ((aten.sub.Tensor, offset, 0), (aten.mul.Tensor, 1 / factor, 1)):
        if not bool((change == neutral).all()):
            out = _inserted(graph, out, target, change.view(size), chosen)
    return out


def _inserted(
    graph: fx.GraphModule, value: fx.Node, target: fx.node.Target, change: Tensor, readers: list[fx.Node]
) -> fx.Node:
    """An operator with a constant between a value and some of its readers."""
    with graph.graph.inserting_after(value):
        new = graph.graph.call_function(target, (value, value))  # type: ignore[arg-type]
    new.args = (value, add_constant(graph, f"{value.name}_balance", change, new))
    new.meta = dict(value.meta)
    for reader in readers:
        reader.replace_input_with(value, new)
    return new
