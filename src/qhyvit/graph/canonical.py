"""One spelling for each thing: aliases dropped, views made reshapes, rare operators written with common ones."""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from qhyvit.graph.ops import (
    add_constant,
    argument,
    as_list,
    aten,
    constant,
    insert,
    is_call,
    scalar,
    shape,
    shortens_batch,
)
from qhyvit.graph.rewrites import REWRITES

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
_CASTS = frozenset(
    {
        aten._to_copy.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.type_as.default,
    }
)
_ELEMENTWISE = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})
_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int})
# Checks that torch.export leaves behind; they compute nothing.
_ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def remove_identities(graph: fx.GraphModule) -> int:
    """Drop dropout (the model is in eval mode), copies, casts to the same type and layout changes to the same shape."""
    removed = 0
    for node in list(graph.graph.nodes):
        if is_call(node, _ASSERTIONS):
            graph.graph.erase_node(node)
            removed += 1
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            removed += 1
    return removed


def _is_identity(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    source = node.args[0]
    same_shape = node.meta.get("shape") == source.meta.get("shape") is not None
    if node.target in _IDENTITIES or _is_neutral(node) or (is_call(node, aten.expand.default) and _broadcast(node)):
        return True
    if node.target in _CASTS:
        return bool(node.meta.get("dtype") == source.meta.get("dtype"))
    if node.target == aten.expand.default:
        return same_shape and not _symbolic(argument(node, "size"))  # else a constant is spread over the batch
    return same_shape and (
        (node.target == aten.reshape.default and len(shape(node)) > 0)
        or node.target == aten.adaptive_avg_pool2d.default
        or (node.target == aten.slice.Tensor and not shortens_batch(node))
    )


def _broadcast(node: fx.Node) -> bool:
    """An expansion that each of its readers, an elementwise operator on a full-size operand, would do by itself."""
    for user in node.users:
        if not is_call(user, _ELEMENTWISE) or len(user.args) != 2:
            return False
        other = user.args[1] if user.args[0] is node else user.args[0]
        if other is node or not isinstance(other, fx.Node) or shape(other) != shape(node) or other.op == "get_attr":
            return False
        if is_call(other, aten.expand.default):
            return False  # both are spread over the batch; one has to stay
    return bool(node.users)


def _is_neutral(node: fx.Node) -> bool:
    """Multiplying or dividing by 1, adding or subtracting 0."""
    if len(node.args) != 2 or not scalar(node.args[1]):
        return False
    if node.target in {aten.mul.Tensor, aten.div.Tensor}:
        return bool(node.args[1] == 1)
    return node.target in {aten.add.Tensor, aten.sub.Tensor} and bool(node.args[1] == 0)


def _symbolic(sizes: Any) -> bool:
    return any(isinstance(s, fx.Node) for s in sizes)


def canonicalise(graph: fx.GraphModule) -> int:
    """One operator for each meaning: every view is a reshape with literal sizes, every matrix product a matmul."""
    changed = _plain_expansions(graph)
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        rewrite = _PLAIN.get(node.target)
        if rewrite is not None:
            changed += rewrite(graph, node)
        elif node.target in REWRITES:
            new = REWRITES[node.target](graph, node)
            if new is not None:
                node.replace_all_uses_with(new)
                graph.graph.erase_node(node)
                changed += 1
    return changed


def _plain_reshape(graph: fx.GraphModule, node: fx.Node) -> int:
    """A reshape whose free batch dimension is written as -1, so that no symbolic size remains in it."""
    sizes = list(shape(node))
    wanted = argument(node, "shape" if node.target == aten.reshape.default else "size")
    free = 0
    if wanted is not None and node.target not in {aten.flatten.using_ints, aten.unflatten.int}:
        symbolic = [i for i, s in enumerate(wanted) if isinstance(s, fx.Node)]
        if len(symbolic) > 1:
            return 0
        if not symbolic and (node.target == aten.reshape.default or -1 not in wanted):
            changed = node.target != aten.reshape.default
            node.target, node.args = aten.reshape.default, (node.args[0], list(wanted))
            return int(changed)
        free = symbolic[0] if symbolic else list(wanted).index(-1)
    sizes[free] = -1
    if math.prod(sizes[:free] + sizes[free + 1 :]) == 0:
        return 0
    node.target, node.args, node.kwargs = aten.reshape.default, (node.args[0], sizes), {}
    return 1


def _plain_expansions(graph: fx.GraphModule) -> int:
    """Where data is expanded, the batch is there already, and its symbolic size becomes -1."""
    data: set[fx.Node] = set()
    changed = 0
    for node in graph.graph.nodes:
        if node.op == "placeholder" or (node.target != aten.sym_size.int and not data.isdisjoint(node.all_input_nodes)):
            data.add(node)
        if is_call(node, aten.expand.default) and node.args[0] in data and _symbolic(argument(node, "size")):
            node.args = (node.args[0], [-1 if isinstance(s, fx.Node) else s for s in argument(node, "size")])
            changed += 1
    return changed


def _same_as(target: Any, count: int | None = None) -> Callable[[fx.GraphModule, fx.Node], int]:
    """A rewrite that only exchanges the operator, keeping the first `count` arguments."""

    def rewrite(graph: fx.GraphModule, node: fx.Node) -> int:
        if node.kwargs:
            return 0
        node.target, node.args = target, node.args[:count]
        return 1

    return rewrite


def _plain_layer_norm(graph: fx.GraphModule, node: fx.Node) -> int:
    return _only_first_output(node, aten.layer_norm.default, (*node.args[:5],))


def _plain_group_norm(graph: fx.GraphModule, node: fx.Node) -> int:
    x, weight, bias, _, _, _, groups, eps = node.args
    return _only_first_output(node, aten.group_norm.default, (x, groups, weight, bias, eps))


def _plain_extreme(target: Any) -> Callable[[fx.GraphModule, fx.Node], int]:
    def rewrite(graph: fx.GraphModule, node: fx.Node) -> int:
        return _only_first_output(node, target, (node.args[0], [argument(node, "dim")], argument(node, "keepdim")))

    return rewrite


def _plain_max_pool(graph: fx.GraphModule, node: fx.Node) -> int:
    return _only_first_output(node, aten.max_pool2d.default, node.args)


def _only_first_output(node: fx.Node, target: Any, args: tuple[Any, ...]) -> int:
    """Replace an operator with several outputs, of which only the first is read, by its one-output form."""
    users = list(node.users)
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in users):
        return 0
    node.target, node.args, node.kwargs = target, args, {}
    for user in users:
        node.meta.update({k: v for k, v in user.meta.items() if k in {"shape", "dtype"}})
        user.replace_all_uses_with(node)
    return 1


def _plain_linear(graph: fx.GraphModule, node: fx.Node) -> int:
    """addmm(bias, x, Wᵀ) and mm(x, Wᵀ) with a constant W become linear(x, W, bias)."""
    old = node.target
    bias, x, weight = node.args if old == aten.addmm.default else (None, *node.args)
    value = constant(graph, weight)
    if node.kwargs or (value is None and bias is not None):
        return 0
    if value is None:
        node.target = aten.matmul.default
        return int(node.target != old)
    transposed = add_constant(graph, f"{node.name}_weight", value.t().contiguous(), node)
    node.target, node.args = aten.linear.default, (x, transposed, bias)
    return 1


def _linear_by_constant(graph: fx.GraphModule, node: fx.Node) -> int:
    """A product with a constant matrix is a linear, whose matrix is a weight."""
    x, matrix = node.args
    value = constant(graph, matrix)
    if value is None or value.ndim != 2 or constant(graph, x) is not None:
        return 0
    return _plain_linear(graph, node)


def _plain_padding(graph: fx.GraphModule, node: fx.Node) -> int:
    """A convolution with padding "same" or "valid" gets numbers, and a padding of its own where the sides differ."""
    mode, kernel = argument(node, "padding"), shape(argument(node, "weight"))[2:]
    dilation = as_list(argument(node, "dilation"), len(kernel))
    total = [0 if mode == "valid" else d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    x = argument(node, "input")
    padding = [t // 2 for t in total]
    if any(t % 2 for t in total):
        pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        x, padding = insert(graph, node, aten.constant_pad_nd.default, x, pads, 0.0), [0] * len(kernel)
    arguments = [argument(node, n) for n in ("weight", "bias", "stride")]
    node.target = aten.conv2d.default
    node.args = (x, *arguments, padding, dilation, argument(node, "groups") or 1)
    node.kwargs = {}
    return 1


_PLAIN: dict[Any, Callable[[fx.GraphModule, fx.Node], int]] = {
    **dict.fromkeys((*_RESHAPES, aten.reshape.default), _plain_reshape),
    aten.bmm.default: _same_as(aten.matmul.default),
    aten._softmax.default: _same_as(aten.softmax.int, 2),
    aten._log_softmax.default: _same_as(aten.log_softmax.int, 2),
    aten.native_layer_norm.default: _plain_layer_norm,
    aten.native_group_norm.default: _plain_group_norm,
    aten.max_pool2d_with_indices.default: _plain_max_pool,
    aten.max.dim: _plain_extreme(aten.amax.default),
    aten.min.dim: _plain_extreme(aten.amin.default),
    aten.addmm.default: _plain_linear,
    aten.mm.default: _plain_linear,
    aten.matmul.default: _linear_by_constant,
    aten.conv2d.padding: _plain_padding,
}


def name_nodes(graph: fx.GraphModule) -> None:
    """Name every node after its module and operator: `stages_2_1_conv_1x1_conv_conv2d`, unique and stable."""
    taken = {node.name for node in graph.graph.nodes if node.op != "call_function"}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        kind = node.target.__name__ if schema is None else schema.name.split("::")[-1]
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
