"""What the passes and the exporters need to know about ATen operators, in one place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Target = Any  # an ATen overload, or `operator.getitem`

CONVOLUTIONS: frozenset[Target] = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
TRANSPOSED: frozenset[Target] = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input})
LINEAR: frozenset[Target] = frozenset({aten.linear.default})
WEIGHTED = CONVOLUTIONS | LINEAR
MATMUL: frozenset[Target] = frozenset({aten.matmul.default})

# Operators that only move numbers: any per-tensor code passes through them unchanged.
LAYOUT: frozenset[Target] = frozenset(
    {
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unbind.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.expand.default,
        aten.roll.default,
        aten.flip.default,
        aten.pixel_shuffle.default,
        aten.repeat.default,
        aten.index.Tensor,
        aten.index_select.default,
        operator.getitem,
    }
)

# Elementwise activation functions of one operand.
ACTIVATIONS: frozenset[Target] = frozenset(
    {
        aten.gelu.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.relu.default,
        aten.relu6.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.tanh.default,
    }
)

# Means over positions: they keep a channel's scale and offset.
AVERAGING: frozenset[Target] = frozenset({aten.mean.dim, aten.adaptive_avg_pool2d.default})

# Everything the graph keeps as it is; whatever else a model contains is decomposed by torch.export first.
KEPT: frozenset[Target] = (
    WEIGHTED
    | TRANSPOSED
    | MATMUL
    | LAYOUT
    | AVERAGING
    | frozenset(
        {
            aten._native_batch_norm_legit_no_training.default,
            aten._unsafe_view.default,
            aten._upsample_bicubic2d_aa.default,
            aten._upsample_bilinear2d_aa.default,
            aten.alias.default,
            aten.avg_pool2d.default,
            aten.batch_norm.default,
            aten.bmm.default,
            aten.celu.default,
            aten.channel_shuffle.default,
            aten.col2im.default,
            aten.clone.default,
            aten.constant_pad_nd.default,
            aten.contiguous.default,
            aten.conv2d.padding,
            aten.dropout.default,
            aten.elu.default,
            aten.flatten.using_ints,
            aten.gelu.default,
            aten.group_norm.default,
            aten.hardsigmoid.default,
            aten.hardswish.default,
            aten.hardtanh.default,
            aten.im2col.default,
            aten.instance_norm.default,
            aten.layer_norm.default,
            aten.leaky_relu.default,
            aten.log_softmax.int,
            aten.log_sigmoid.default,
            aten.max_pool2d.default,
            aten.mish.default,
            aten.native_group_norm.default,
            aten.native_layer_norm.default,
            aten.pad.default,
            aten.pixel_unshuffle.default,
            aten.prelu.default,
            aten.relu.default,
            aten.relu6.default,
            aten.rms_norm.default,
            aten.scaled_dot_product_attention.default,
            aten.selu.default,
            aten.silu.default,
            aten.softmax.int,
            aten.softplus.default,
            aten._upsample_nearest_exact2d.vec,
            aten.adaptive_avg_pool1d.default,
            aten.avg_pool1d.default,
            aten.upsample_bicubic2d.vec,
            aten.upsample_bilinear2d.vec,
            aten.upsample_nearest2d.vec,
            aten.var.correction,
            aten.var_mean.correction,
            aten.view.default,
        }
    )
)


def is_call(node: object, targets: frozenset[Target] | Target) -> bool:
    """Whether `node` calls one of `targets`."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return node.target in targets if isinstance(targets, frozenset) else node.target == targets


def only_activation(node: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """The activation function that alone reads a value, None where there is none or something else reads it too."""
    readers = list(node.users)
    if len(readers) != 1 or not is_call(readers[0], ACTIVATIONS):
        return None
    reader = readers[0]
    return lambda x: reader.target(x, *reader.args[1:], **reader.kwargs)  # type: ignore[operator,no-any-return]


def only_norms_read(node: fx.Node) -> bool:
    """Whether LayerNorms over the last axis, and nothing else, read a value."""
    kind = aten.layer_norm.default
    return bool(node.users) and all(u.target == kind and len(argument(u, "normalized_shape")) == 1 for u in node.users)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The value of one argument by its schema name, whether it was passed by position, by keyword or not at all."""
    schema = node.target._schema  # type: ignore[union-attr]
    for i, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, parameter.default_value if parameter.has_default_value() else default)
    return default


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's output for one picture, as `shapes.infer` recorded it."""
    value: tuple[int, ...] = node.meta["shape"]
    return value


def constant(graph: fx.GraphModule, node: object) -> Tensor | None:
    """The tensor behind a constant node, or None where `node` is no constant."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        tensor: Tensor = getattr(graph, str(node.target))
        return tensor
    return None


def shortens_batch(node: fx.Node) -> bool:
    """Whether a slice takes some of the first axis, which the shape for one picture cannot tell."""
    if argument(node, "dim") % len(shape(node)) != 0:
        return False
    end = argument(node, "end")
    return bool(argument(node, "start")) or argument(node, "step") != 1 or not (end is None or end >= 2**31)


def scalar(value: object) -> bool:
    """Whether an argument is a plain number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def add_constant(graph: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """Store `value` under a fresh name and return a node, placed before `before`, that reads it."""
    fresh, n = name, 0
    while hasattr(graph, fresh):
        n += 1
        fresh = f"{name}_{n}"
    graph.register_buffer(fresh, value.detach().clone())
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(fresh)
    node.meta.update(shape=tuple(value.shape), dtype=value.dtype, module=before.meta.get("module", ""))
    return node


def insert(graph: fx.GraphModule, before: fx.Node, target: Target, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call just before `before`, with its module name and with the shape and dtype of its output."""
    with graph.graph.inserting_before(before):
        node = graph.graph.call_function(target, args, kwargs)
    copy_meta(before, node)

    def empty(source: fx.Node) -> Any:
        if "shape" not in source.meta:
            return source.meta["value"]
        return torch.empty(shape(source), dtype=source.meta["dtype"], device="meta")

    result = target(*fx.node.map_arg(args, empty), **fx.node.map_arg(kwargs, empty))
    node.meta.update(shape=tuple(result.shape), dtype=result.dtype)
    return node


def weight_of(graph: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor | None] | None:
    """Weight (C_out, C_in / groups, …) and bias (C_out,) of a convolution or linear with constant weights."""
    weight = constant(graph, argument(node, "weight"))
    bias_node = argument(node, "bias")
    bias = constant(graph, bias_node)
    if weight is None or (bias_node is not None and bias is None):
        return None
    return weight, bias


def set_weight(graph: fx.GraphModule, node: fx.Node, weight: Tensor, bias: Tensor | None) -> None:
    """Give a convolution or linear constants of its own (others that shared the old ones keep them)."""
    values: dict[str, Tensor | None] = {"weight": weight, "bias": bias}
    arguments = [p.name for p in node.target._schema.arguments]  # type: ignore[union-attr]
    args = list(node.args)
    for name, value in values.items():
        if value is None:
            continue
        position = arguments.index(name)
        old = args[position] if position < len(args) else None
        base = str(old.target) if isinstance(old, fx.Node) else f"{node.name}_{name}"
        while len(args) <= position:
            args.append(None)
        args[position] = add_constant(graph, base, value, node)
    node.args = tuple(args)


def channel_axis(node: fx.Node) -> int:
    """The axis that holds the output channels of a convolution or linear."""
    return len(shape(node)) - 1 if is_call(node, LINEAR) else 1


def copy_meta(source: fx.Node, *targets: fx.Node) -> None:
    """Let new nodes carry the module name of the node they replace."""
    for target in targets:
        target.meta["module"] = source.meta.get("module", "")


def tidy(graph: fx.GraphModule) -> None:
    """Drop dead nodes and constants nobody reads, and recompile."""
    graph.graph.eliminate_dead_code()
    used = {str(n.target) for n in graph.graph.nodes if n.op in {"get_attr", "call_module"}}
    for name in [n for n, _ in graph.named_buffers(recurse=False) if n not in used]:
        delattr(graph, name)
    for name in [n for n, _ in graph.named_children() if n not in used]:
        delattr(graph, name)
    graph.recompile()


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own that shares the tensors; node names and meta are kept."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = new.graph_copy(graph.graph, copies)
    new.output(output)
    for old, twin in copies.items():
        twin.meta = dict(old.meta)
        twin.name = old.name
    root = torch.nn.Module()
    for name, tensor in graph.named_buffers(recurse=False):
        root.register_buffer(name, tensor)
    return fx.GraphModule(root, new)


def as_list(value: int | Sequence[int], n: int) -> list[int]:
    """A convolution's stride, padding or dilation as a list of `n` numbers."""
    if isinstance(value, int):
        return [value] * n
    return list(value) * n if len(value) == 1 else list(value)
