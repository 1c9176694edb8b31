"""In-place operators made plain, where that is plain to see; torch.export's own way traces the model a second time."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from qhyvit.graph.ops import KEPT


def functional(program: ExportedProgram) -> ExportedProgram:
    """The same program without in-place operators and with no operator that is better decomposed.

    Nets that only apply in-place activations to fresh values are rewritten node by node; for all others torch.export
    decomposes and functionalizes, which costs about as long as the export.
    """
    table: Any = torch.export.default_decompositions()
    for kept in KEPT:
        if kept in table:
            table.pop(kept)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    plain: dict[fx.Node, Any] = {}
    for node in calls:
        if _mutates(node):
            plain[node] = _out_of_place(node, plain)
    if all(plain.values()) and not any(_decomposes(plain.get(n, n.target), table) for n in calls):
        for node, target in plain.items():
            node.target = target
        return program
    decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed


def _decomposes(target: Any, table: Any) -> bool:
    """Whether torch.export would write a call in simpler operators, or it holds a subgraph that may need it."""
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") != "_operator"
    if target in KEPT or target == torch.ops.aten.sym_size.int:
        return False
    name: str = target.name()  # type: ignore[no-untyped-call]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return composite or target in table


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _out_of_place(node: fx.Node, plain: dict[fx.Node, Any]) -> Any | None:
    """`aten.relu` for `aten.relu_` and so on, if nobody else can see the value that it overwrites.

    Args:
        node: the in-place call.
        plain: earlier in-place calls and what they become.
    """
    target: Any = node.target
    source = node.args[0]
    name = target._schema.name.split("::")[-1]
    if not name.endswith("_") or not isinstance(source, fx.Node) or set(source.users) != {node}:
        return None
    if not plain.get(source) and not _fresh(source):
        return None
    return getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), target._overloadname, None)


def _fresh(node: fx.Node) -> bool:
    """Whether an operator's output shares memory with nothing."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target == torch.ops.aten.dropout.default:  # in eval mode it returns what it was given
        source = node.args[0]
        return isinstance(source, fx.Node) and set(source.users) == {node} and _fresh(source)
    return all(r.alias_info is None for r in node.target._schema.returns)
