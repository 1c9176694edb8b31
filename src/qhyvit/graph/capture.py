"""From an `nn.Module` to a graph of plain, functional ATen operators with a free batch dimension."""

from __future__ import annotations

import operator
import warnings
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from qhyvit.errors import CaptureError
from qhyvit.graph.functional import functional
from qhyvit.graph.normalise import normalise
from qhyvit.graph.ops import WEIGHTED, argument, copy_graph, tidy


def capture(model: nn.Module, example: Tensor, *, passes: bool = True) -> fx.GraphModule:
    """Capture an image classifier as a normalised float graph.

    Args:
        model: any module that maps pictures (N, 3, H, W) to logits (N, classes); switched to eval mode. A graph that
            was captured before, and perhaps rewritten since, is copied as it is.
        example: one batch of pictures; its batch size does not matter, its H and W are fixed.
        passes: whether to run the normalising passes (`qhyvit.graph.normalise`) or only to capture.

    Returns:
        A graph module over ATen operators; constants are buffers, each node's `meta` holds `module` (the dotted name
        of the module it came from) and `shape` (of its output for one picture).

    Raises:
        CaptureError: if the model cannot be exported, has data-dependent control flow, a fixed batch size or recurrent
            layers.
    """
    if is_captured(model):
        return _copied(model, example)
    _refuse_recurrence(model)
    model = model.eval()
    example = example[:1].repeat(2, *[1] * (example.ndim - 1))  # a batch of one would be taken for a constant
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # caches assigned during export; they become constants of the graph
            program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
            program = functional(program)
    except Exception as error:  # torch.export raises many kinds; each means the same to the user
        reason = str(error).strip().splitlines()
        raise CaptureError(
            f"{type(model).__name__} cannot be captured by torch.export ({type(error).__name__}: "
            f"{reason[0] if reason else 'no reason given'}); make its forward free of data-dependent control flow "
            "and of fixed batch sizes."
        ) from error
    graph = _lift(program)
    if passes:
        normalise(graph, example[:1])
        _refuse_low_precision(graph)
    return graph


def is_captured(model: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether a module is what `capture` gave: operators only, each with the module that it came from."""
    if not isinstance(model, fx.GraphModule):
        return False
    kinds = {"placeholder", "get_attr", "call_function", "output"}
    nodes = [n for n in model.graph.nodes if n.op != "output"]
    return all(n.op in kinds and "module" in n.meta for n in nodes) and all(
        "shape" in n.meta for n in nodes if n.op == "placeholder"
    )


def _copied(graph: fx.GraphModule, example: Tensor) -> fx.GraphModule:
    (pictures,) = (n for n in graph.graph.nodes if n.op == "placeholder")
    if pictures.meta["shape"][1:] != example.shape[1:]:
        made, asked = ("×".join(map(str, size[1:])) for size in (pictures.meta["shape"], example.shape))
        raise CaptureError(f"The graph was captured for pictures of {made}, not {asked}; capture the module anew.")
    new = copy_graph(graph)
    for name, tensor in list(new.named_buffers()):
        setattr(new, name, tensor.detach().clone())
    return new


def _refuse_recurrence(model: nn.Module) -> None:
    """Refuse what torch.export would write out step by step, for minutes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise CaptureError(
                f"{name or 'The model'} is recurrent ({type(module).__name__}); recurrent layers are not supported. "
                "Quantize a model without them."
            )


def _refuse_low_precision(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.meta.get("dtype") in {torch.float16, torch.bfloat16}:
            raise CaptureError(
                f"{node.meta.get('module') or 'the model'} computes in {node.meta['dtype']}; switch autocast off and "
                "call .float() on the model before it is quantized."
            )


def _lift(program: ExportedProgram) -> fx.GraphModule:
    """The exported program with parameters and constants as buffers and pictures as the only input."""
    root = nn.Module()
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}  # type: ignore[union-attr]
    stores = {**program.state_dict, **program.constants}

    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = inputs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                values[node] = graph.placeholder("pictures")
                values[node].meta["module"] = ""
                continue
            name = _fresh(root, str(spec.target))
            root.register_buffer(name, stores[spec.target].detach().clone())  # type: ignore[index]
            values[node] = graph.get_attr(name)
            values[node].meta["module"] = str(spec.target).rpartition(".")[0]
        elif node.op == "output":
            kinds = [spec.kind for spec in program.graph_signature.output_specs]
            logits = [a for a, kind in zip(node.args[0], kinds, strict=True) if kind == OutputKind.USER_OUTPUT]
            graph.output(_single(fx.node.map_arg(logits, lambda n: values[n])))
        else:
            values.update(_copy(program.graph_module, node, graph, values))
    root.eval()
    module = fx.GraphModule(root, graph)
    tidy(module)
    return module


def _copy(owner: nn.Module, node: fx.Node, graph: fx.Graph, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Copy one node, opening the subgraphs that torch.export makes of autocast and no_grad regions."""
    if node.op == "get_attr":  # only subgraphs are read this way; they are opened where they are called
        return {node: getattr(owner, str(node.target))}
    name = getattr(node.target, "__name__", str(node.target))
    if name in {"wrap_with_autocast", "wrap_with_set_grad_enabled"}:
        return {node: _inline(node, name, graph, values)}
    if node.target is operator.getitem and not isinstance(values[node.all_input_nodes[0]], fx.Node):
        opened, position = node.args
        return {node: values[opened][position]}  # type: ignore[index]  # an output of an opened subgraph
    new = graph.node_copy(node, lambda n: values[n])
    new.meta = {"module": _module_name(node)}
    weight = argument(new, "weight") if new.target in WEIGHTED else None
    holder = str(weight.meta.get("module", "")) if isinstance(weight, fx.Node) else ""
    if holder and (not new.meta["module"] or holder.startswith(f"{new.meta['module']}.")):
        new.meta["module"] = holder  # inside opened regions torch.export loses the inner modules' names
    if node.target == torch.ops.aten.squeeze.default:  # on a batch of one it would take the batch axis too
        sizes = node.all_input_nodes[0].meta["val"].shape
        ones = [i for i, size in enumerate(sizes) if isinstance(size, int) and size == 1]
        new.target, new.args = torch.ops.aten.squeeze.dims, (new.args[0], ones)
    return {node: new}


def _inline(node: fx.Node, kind: str, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    if kind == "wrap_with_autocast":
        device, _, enabled = node.args[:3]
        if enabled and device == "cpu":
            raise CaptureError(f"{_module_name(node)}: autocast to a lower precision on the CPU is not supported.")
    first = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    subgraph = values[node.args[first]]  # type: ignore[index]
    inner: dict[fx.Node, Any] = {}
    arguments = iter(node.args[first + 1 :])
    for sub in subgraph.graph.nodes:
        if sub.op == "placeholder":
            inner[sub] = fx.node.map_arg(next(arguments), lambda n: values[n])
        elif sub.op == "output":
            return fx.node.map_arg(sub.args[0], lambda n: inner[n])
        else:
            inner.update(_copy(subgraph, sub, graph, inner))
    raise CaptureError(f"{_module_name(node)}: a captured region has no output.")


def _fresh(root: nn.Module, name: str) -> str:
    """A plain buffer name not taken yet: `a.b_c` and `a_b.c` both become `a_b_c`, and `0.weight` has no plain one."""
    name = "".join(c if c.isalnum() else "_" for c in name)
    name = name if name.isidentifier() else f"n_{name}"
    fresh, n = name, 0
    while hasattr(root, fresh):
        n += 1
        fresh = f"{name}_{n}"
    return fresh


def _single(outputs: Any) -> fx.Node:
    """The logits: the only output, or the first of several."""
    while isinstance(outputs, tuple | list):
        if len(outputs) != 1:
            raise CaptureError(
                f"the model returns {len(outputs)} outputs; wrap it so that it returns only the logits (N, classes)."
            )
        outputs = outputs[0]
    if not isinstance(outputs, fx.Node):
        raise CaptureError(f"the model returns {type(outputs).__name__}, not logits of shape (N, classes).")
    return outputs


def _module_name(node: fx.Node) -> str:
    """Dotted name of the innermost module a node came from ("" for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    name: str = next(reversed(stack.values()))[0] if stack else ""
    return name.partition("@")[0]
