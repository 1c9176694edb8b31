"""What depends on constants alone is computed once, here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.graph.ops import add_constant, argument, aten, constant, insert, is_call

_UNDEFINED = frozenset({aten.empty.memory_format, aten.rand.default, aten.randn.default})


def fold_constants(graph: fx.GraphModule) -> int:
    """Evaluate whatever depends on constants only (relative position tables, transposed weights, …)."""
    values = _evaluate(graph, None)
    return _store(graph, values) + _fold_over_batch(graph)


def _evaluate(graph: fx.GraphModule, batch: int | None) -> dict[fx.Node, Any]:
    """Values of all nodes that depend on constants, and on the batch size where that is given."""
    values: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            values[node] = constant(graph, node)
        elif batch is not None and _is_batch_size(node):
            values[node] = batch
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            if node.target in _UNDEFINED:
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    return values


def _is_batch_size(node: fx.Node) -> bool:
    if not is_call(node, aten.sym_size.int):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and source.op == "placeholder" and argument(node, "dim") == 0


def _store(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> int:
    folded = 0
    for node, value in values.items():
        needed = any(user not in values for user in node.users)
        if node.op == "get_attr" or not needed or not isinstance(value, Tensor):
            continue
        node.replace_all_uses_with(add_constant(graph, f"{node.name}_value", value.contiguous(), node))
        folded += 1
    return folded


def _fold_over_batch(graph: fx.GraphModule) -> int:
    """What depends on constants and the batch size, and is the same for every picture, as a constant spread over it."""
    sizes = [n for n in graph.graph.nodes if _is_batch_size(n)]
    if not sizes:
        return 0
    one, three = _evaluate(graph, 1), _evaluate(graph, 3)
    folded = 0
    for node, value in one.items():
        if node.op == "get_attr" or not isinstance(value, Tensor) or all(user in one for user in node.users):
            continue
        if is_call(node, aten.expand.default) and constant(graph, node.args[0]) is not None:
            continue  # done already
        axis = _free_axis(value, three[node])
        if axis is None:
            continue
        stored = add_constant(graph, f"{node.name}_value", value.contiguous(), node)
        size: list[Any] = list(value.shape)
        size[axis] = sizes[0]
        spread = insert(graph, node, aten.expand.default, stored, size)
        node.replace_all_uses_with(spread)
        folded += 1
    return folded


def _free_axis(one: Tensor, three: Tensor) -> int | None:
    """The axis along which the value for three pictures is that for one picture repeated."""
    grown = [i for i, (a, b) in enumerate(zip(one.shape, three.shape, strict=True)) if a != b]
    if len(grown) != 1 or one.shape[grown[0]] != 1:
        return None
    return grown[0] if torch.equal(one.expand(three.shape), three) else None
