"""One spelling for each thing: aliases dropped, views made reshapes, constants evaluated, nodes named."""

from __future__ import annotations

import keyword
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.graph.ops import add_constant, argument, aten, constant, is_call, scalar, shape

_IDENTITIES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten.lift_fresh_copy.default,
    }
)
_ELEMENTWISE = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})
_RESHAPES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default}
)


def remove_identities(graph: fx.GraphModule) -> int:
    """Drop dropout (the model is in eval mode), copies, casts to the same type and layout changes to the same shape."""
    removed = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        same_shape = node.meta.get("shape") == source.meta.get("shape") is not None
        same = node.target in _IDENTITIES
        same |= node.target in {
            aten._to_copy.default,
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
        } and node.meta.get("dtype") == source.meta.get("dtype")
        same |= node.target in {aten.reshape.default, aten.expand.default} and same_shape and len(shape(node)) > 0
        same |= node.target == aten.slice.Tensor and same_shape
        same |= node.target in {aten.adaptive_avg_pool2d.default} and same_shape
        same |= _is_neutral(node)
        if same and node.target == aten.expand.default and _symbolic(argument(node, "size")):
            same = False  # a constant spread over the batch
        same |= is_call(node, aten.expand.default) and _broadcast_anyway(node)
        if same:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            removed += 1
    return removed


def _broadcast_anyway(node: fx.Node) -> bool:
    """An expansion that each of its readers, an elementwise operator on a full-size operand, would do by itself."""
    for user in node.users:
        if not is_call(user, _ELEMENTWISE) or len(user.args) != 2:
            return False
        other = user.args[1] if user.args[0] is node else user.args[0]
        if other is node or not isinstance(other, fx.Node) or shape(other) != shape(node) or other.op == "get_attr":
            return False
    return bool(node.users)


def _is_neutral(node: fx.Node) -> bool:
    """Multiplying or dividing by 1, adding or subtracting 0."""
    if len(node.args) != 2 or not scalar(node.args[1]):
        return False
    if node.target in {aten.mul.Tensor, aten.div.Tensor}:
        return node.args[1] == 1
    return node.target in {aten.add.Tensor, aten.sub.Tensor} and node.args[1] == 0


def _symbolic(sizes: Any) -> bool:
    return any(isinstance(s, fx.Node) for s in sizes)


def canonicalise(graph: fx.GraphModule) -> int:
    """One operator for each meaning: every view is a reshape with literal sizes, every matrix product a matmul."""
    changed = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _RESHAPES or (node.target == aten.reshape.default and _symbolic(argument(node, "shape"))):
            changed += _plain_reshape(node)
        elif node.target == aten.bmm.default:
            node.target = aten.matmul.default
            changed += 1
        elif node.target == aten._softmax.default:
            node.target, node.args = aten.softmax.int, node.args[:2]
            changed += 1
        elif node.target == aten.native_layer_norm.default:
            changed += _only_first_output(node, aten.layer_norm.default, (*node.args[:5],))
        elif node.target == aten.native_group_norm.default:
            x, weight, bias, _, _, _, groups, eps = node.args
            changed += _only_first_output(node, aten.group_norm.default, (x, groups, weight, bias, eps))
        elif node.target in {aten.addmm.default, aten.mm.default}:
            changed += _plain_linear(graph, node)
        elif node.target == aten.conv2d.padding:
            changed += _plain_padding(node)
    return changed


def _plain_reshape(node: fx.Node) -> int:
    """A reshape whose free batch dimension is written as -1, so that no symbolic size remains in it."""
    sizes = list(shape(node))
    wanted = argument(node, "shape" if node.target == aten.reshape.default else "size")
    free = 0
    if wanted is not None and node.target not in {aten.flatten.using_ints, aten.unflatten.int}:
        symbolic = [i for i, s in enumerate(wanted) if isinstance(s, fx.Node)]
        if len(symbolic) > 1:
            return 0
        if not symbolic and -1 not in wanted:
            if list(wanted) == list(argument(node, "shape", wanted)) and node.target == aten.reshape.default:
                return 0
            node.target, node.args = aten.reshape.default, (node.args[0], list(wanted))
            return 1
        free = symbolic[0] if symbolic else list(wanted).index(-1)
    sizes[free] = -1
    if math.prod(sizes[:free] + sizes[free + 1 :]) == 0:
        return 0
    node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], sizes), {}
    return 1


def _only_first_output(node: fx.Node, target: Any, args: tuple[Any, ...]) -> int:
    """Replace an operator with several outputs, of which only the first is read, by its one-output form."""
    users = list(node.users)
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in users):
        return 0
    node.target, node.args, node.kwargs = target, args, {}
    for user in users:
        user.replace_all_uses_with(node)
    return 1


def _plain_linear(graph: fx.GraphModule, node: fx.Node) -> int:
    """addmm(bias, x, Wᵀ) and mm(x, Wᵀ) with a constant W become linear(x, W, bias)."""
    bias, x, weight = node.args if node.target == aten.addmm.default else (None, *node.args)
    value = constant(graph, weight)
    if value is None or node.kwargs:
        return 0
    transposed = add_constant(graph, f"{node.name}_weight", value.t().contiguous(), node)
    node.target, node.args = aten.linear.default, (x, transposed, bias)
    return 1


def _plain_padding(node: fx.Node) -> int:
    """A convolution with padding "same" or "valid" gets numbers, where they are the same on both sides."""
    mode, kernel = argument(node, "padding"), shape(argument(node, "weight"))[2:]
    dilation = (
        [argument(node, "dilation")] if isinstance(argument(node, "dilation"), int) else argument(node, "dilation")
    )
    dilation = list(dilation) * (2 if len(dilation) == 1 else 1)
    total = [0, 0] if mode == "valid" else [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        return 0
    arguments = [argument(node, n) for n in ("input", "weight", "bias", "stride")]
    node.target = aten.conv2d.default
    node.args = (*arguments, [t // 2 for t in total], dilation, argument(node, "groups") or 1)
    node.kwargs = {}
    return 1


def fold_constants(graph: fx.GraphModule) -> int:
    """Evaluate whatever depends on constants only (relative position tables, transposed weights, …)."""
    folded = 0
    values: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            values[node] = getattr(graph, str(node.target))
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        needed = any(user not in values for user in node.users)
        if node.op == "get_attr" or not needed or not isinstance(value, Tensor):
            continue
        node.replace_all_uses_with(add_constant(graph, f"{node.name}_value", value.contiguous(), node))
        folded += 1
    return folded


def name_nodes(graph: fx.GraphModule) -> None:
    """Name every node after its module and operator: `stages_2_1_conv_1x1_conv_conv2d`, unique and stable."""
    taken: set[str] = set()
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        kind = node.target.__name__ if node.target is operator.getitem else node.target._schema.name.split("::")[-1]
        module = str(node.meta.get("module", "")).replace(".", "_")
        base = "".join(c if c.isalnum() else "_" for c in f"{module}_{kind}".strip("_"))
        if not base.isidentifier() or keyword.iskeyword(base):
            base = f"n_{base}"
        name, n = base, 1
        while name in taken:
            n += 1
            name = f"{base}_{n}"
        taken.add(name)
        node.name = name
    graph.recompile()
