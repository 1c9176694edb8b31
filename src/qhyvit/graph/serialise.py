"""A captured graph as JSON and back, without pickle: operators by name, constants by the name of their tensor.

A graph module is Python source that torch generates and runs, and ATen holds operators that write files (`aten.save`,
`aten.from_file`), so a file is read as hostile: only operators that compute, only plain names, no code of its own.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.errors import ModelError
from qhyvit.graph.ops import KEPT, aten

# On tensors' sizes, and on the outputs of operators with several.
_PYTHON = {
    f"operator.{f.__name__}": f
    for f in (
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.pow,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
    )
}
_NAMES_OF_PYTHON = {function: name for name, function in _PYTHON.items()}
# torch.export writes them beside casts; they take text and return nothing, and do no more than raise
_ASSERTIONS = frozenset({aten._assert_tensor_metadata.default, aten._assert_scalar.default})
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATOR = re.compile(r"aten\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
_TORCH_VALUES: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def to_json(graph: fx.GraphModule) -> dict[str, Any]:
    """Describe a captured graph.

    Args:
        graph: operators and constants only, as `capture` gives it.

    Returns:
        JSON-able: `{"nodes": [...]}`, each node with `name`, `op`, `target`, `args`, `kwargs`, and of its meta
        `module`, `shape`, `dtype`. Constants are named, their values are not here.

    Raises:
        ModelError: if the graph holds something that `from_json` would refuse.
    """
    nodes = list(graph.graph.nodes)
    twice = [name for name, count in Counter(node.name for node in nodes).items() if count > 1]
    if twice:
        raise ModelError(f"The graph cannot be saved: two of its nodes are called {twice[0]!r}.")
    try:
        return {"nodes": [_node_to_json(node) for node in nodes]}
    except ValueError as error:
        raise ModelError(f"The graph cannot be saved: {error}.") from None


def from_json(data: Any, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Build the graph that `to_json` described; names, order and meta are the same.

    Args:
        data: parsed JSON, not trusted.
        tensors: the constants by name; used as they are.

    Raises:
        ModelError: naming the node and its fault.
    """
    if not isinstance(data, dict) or not isinstance(data.get("nodes"), list):
        raise ModelError("The graph is not a list of nodes.")
    root, graph, nodes = torch.nn.Module(), fx.Graph(), dict[str, fx.Node]()
    for position, entry in enumerate(data["nodes"]):
        name = entry.get("name") if isinstance(entry, dict) else None
        try:
            if position and next(reversed(nodes.values())).op == "output":
                raise ValueError("it follows the output")
            node = _node_from_json(entry, graph, nodes)
            if node.op == "get_attr":
                _add_constant(root, str(node.target), node, tensors)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ModelError(f"Node {position} of the graph ({str(name)[:80]!r}) cannot be read: {said}.") from None
        nodes[node.name] = node
    if not nodes or node.op != "output":
        raise ModelError("The graph has no output.")
    root.eval()
    try:
        return fx.GraphModule(root, graph)
    except Exception as error:  # torch generates source from the graph, which can fail in any way
        raise ModelError(f"The graph cannot be built: {type(error).__name__}: {error}.") from None


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    where = f"node {node.name!r}"
    entry: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        entry["target"] = _target_to_json(node.target, where)
    elif node.op in {"placeholder", "get_attr", "output"}:
        entry["target"] = str(node.target)
    else:
        raise ValueError(f"{where} is a {node.op}, not an operator")
    entry["args"] = [_value_to_json(a, where) for a in node.args]
    entry["kwargs"] = {key: _value_to_json(a, where) for key, a in node.kwargs.items()}
    meta: dict[str, Any] = {"module": str(node.meta["module"])} if "module" in node.meta else {}
    if "shape" in node.meta:
        meta |= {"shape": list(node.meta["shape"]), "dtype": _plain_name(node.meta["dtype"])}
    return entry | {"meta": meta}


def _node_from_json(entry: Any, graph: fx.Graph, nodes: dict[str, fx.Node]) -> fx.Node:
    """Append one node; ValueError, KeyError or TypeError say what is wrong with it."""
    name, op, target, meta = entry["name"], entry["op"], entry["target"], entry["meta"]
    # torch writes names into the source it generates, so nothing but a plain name may pass
    _check_name(name)
    if name in nodes:
        raise ValueError("its name is taken")
    args = tuple(_value_from_json(a, nodes) for a in entry["args"])
    kwargs = {_check_name(key): _value_from_json(a, nodes) for key, a in entry["kwargs"].items()}
    if op == "call_function":
        function: Any = _target_from_json(target)
    elif op in {"placeholder", "get_attr", "output"}:
        function = _check_name(target)
        if kwargs or len(args) != (op == "output"):
            raise ValueError(f"a {op} has other arguments")
    else:
        raise ValueError(f"{op!r} is not an operator")
    node = graph.create_node(op, function, args, kwargs, name=name)
    node.name = name
    if "module" in meta:
        node.meta["module"] = str(meta["module"])
    if "shape" in meta:
        node.meta["shape"] = tuple(int(size) for size in meta["shape"])
        node.meta["dtype"] = _torch_value("dtype", meta["dtype"])
    return node


def _add_constant(root: torch.nn.Module, name: str, node: fx.Node, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        raise ValueError(f"there is no tensor {name!r}")
    tensor, meta = tensors[name], node.meta
    if "shape" in meta and (tuple(tensor.shape), tensor.dtype) != (meta["shape"], meta["dtype"]):
        raise ValueError(f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, another than the graph was made for")
    if name not in dict(root.named_buffers()):
        root.register_buffer(name, tensor)


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
        raise ValueError(f"{str(name)[:80]!r} is not a plain name")
    return name


# Operators --------------------------------------------------------------------------------------------------------


def _target_to_json(target: Any, where: str) -> str:
    if target in _NAMES_OF_PYTHON:
        return _NAMES_OF_PYTHON[target]
    if not isinstance(target, torch._ops.OpOverload) or not _computes(target):
        raise ValueError(f"{where} calls {target}, which is not an ATen operator that only computes")
    return str(target)


def _target_from_json(name: Any) -> Callable[..., Any]:
    if isinstance(name, str) and name in _PYTHON:
        return _PYTHON[name]
    match = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
    packet = getattr(aten, match[1], None) if match else None
    if match and isinstance(packet, torch._ops.OpOverloadPacket) and match[2] in packet.overloads():  # type: ignore[no-untyped-call]
        overload: torch._ops.OpOverload[..., Any] = getattr(packet, match[2])
        if _computes(overload):
            return overload
    raise ValueError(f"target {str(name)[:80]!r} is not an ATen operator that only computes")


def _computes(overload: torch._ops.OpOverload[..., Any]) -> bool:
    """Whether an operator turns tensors and numbers into others and does nothing else.

    Beyond the operators that capture keeps and the core ATen set, that is told from the schema: it changes no
    argument, is not private, and takes no text, with which some name files and others print.
    """
    schema = overload._schema
    if overload.namespace != "aten" or schema.is_mutable:
        return False
    if overload in KEPT | _ASSERTIONS or torch.Tag.core in overload.tags:
        return True
    private = schema.name.startswith("aten::_")
    return not private and bool(schema.returns) and not any("str" in str(a.type) for a in schema.arguments)


# Arguments --------------------------------------------------------------------------------------------------------


def _value_to_json(value: Any, where: str) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        items = [_value_to_json(item, where) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, of in _TORCH_VALUES.items():
        if isinstance(value, of):
            return {kind: _plain_name(value)}
    raise ValueError(f"{where} has an argument of type {type(value).__name__}")


def _value_from_json(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_value_from_json(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("an argument is of several kinds")
    ((kind, held),) = value.items()
    if kind == "node":
        if held not in nodes:
            raise ValueError(f"it reads {str(held)[:80]!r}, which does not come before it")
        return nodes[held]
    if kind == "tuple":
        return tuple(_value_from_json(item, nodes) for item in held)
    if kind == "float":
        return float(held)
    if kind == "device":
        return torch.device(held)
    return _torch_value(kind, held)


def _plain_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _torch_value(kind: str, name: Any) -> Any:
    """A constant of torch such as `torch.float32`, by its name, checked to be of that kind."""
    if kind not in _TORCH_VALUES:
        raise ValueError(f"an argument is of unknown kind {str(kind)[:80]!r}")
    value = getattr(torch, _check_name(name), None)
    if not isinstance(value, _TORCH_VALUES[kind]):
        raise ValueError(f"{name!r} is no {kind}")
    return value
