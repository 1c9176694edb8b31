"""Sites: every weight and every activation that may be quantized, placed by scope and by what the target needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from qhyvit.graph.ops import (
    CONVOLUTIONS,
    LAYOUT,
    LINEAR,
    MATMUL,
    WEIGHTED,
    argument,
    aten,
    channel_axis,
    constant,
    is_call,
    only_norms_read,
    shape,
    weight_of,
)
from qhyvit.graph.poles import meets_pole

# Layout operators that keep every number: a tensor has the same range before and after. (A slice has not: each of
# query, key and value deserves a scale of its own.)
_BIJECTIVE = frozenset(
    {
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.roll.default,
        aten.flip.default,
        aten.pixel_shuffle.default,
    }
)


_MASK = -50.0  # exp(-50) is nothing beside 1; Swin masks with -100


@dataclass(frozen=True)
class WeightSite:
    """The weight of one convolution or linear.

    Attributes:
        node: name of the graph node.
        module: dotted name of the module it came from.
        shape: (C_out, C_in / groups, …); the output channel is axis 0.
        kind: "conv" or "linear".
        depthwise: whether each output channel reads one input channel.
    """

    node: str
    module: str
    shape: tuple[int, ...]
    kind: str
    depthwise: bool


@dataclass(frozen=True)
class ActivationSite:
    """A value that is quantized for some of its readers.

    Attributes:
        value: name of the graph node that makes the value; also the site's name.
        module: dotted name of the module the quantization belongs to (the consumer's, or the producer's for outputs).
        readers: names of the nodes that see the quantized value; the others see the float one.
        shape: for one picture.
        channel_axis: axis of the channels in `shape`.
        role: "input" of an operator that computes in integers, or "output" that only the scope or the target quantizes.
    """

    value: str
    module: str
    readers: tuple[str, ...]
    shape: tuple[int, ...]
    channel_axis: int
    role: str


@dataclass(frozen=True)
class Sites:
    """All sites of one graph, in graph order."""

    weights: tuple[WeightSite, ...]
    activations: tuple[ActivationSite, ...]

    def modules(self) -> list[str]:
        """Dotted names of all modules that hold a site, sorted."""
        return sorted({s.module for s in self.weights} | {s.module for s in self.activations})


def place(
    graph: fx.GraphModule,
    *,
    scope: str = "partial",
    is_float: Callable[[str], bool] = lambda module: False,
    quantized_outputs: frozenset[str] = frozenset(),
) -> Sites:
    """Find the sites.

    Args:
        graph: a captured graph.
        scope: "partial": weights and inputs of convolution, linear and matmul; "full": also every other value, save
            scores under a mask, whose range says nothing (they are quantized before the mask), and sums that a norm
            forms of codes and an offset by channel. In neither, what is divided by (`poles.meets_pole`).
        is_float: whether the recipe leaves the layer of this module name in float.
        quantized_outputs: kinds of operators ("conv", "linear", "matmul", "add", …) whose output the target needs
            quantized to run them in integers.
    """
    nodes = [n for n in graph.graph.nodes if n.op in {"placeholder", "call_function"}]
    weights: list[WeightSite] = []
    readers: dict[fx.Node, list[fx.Node]] = {}
    owner: dict[fx.Node, str] = {}
    for node in nodes:
        if not is_call(node, WEIGHTED | MATMUL) or is_float(node.meta["module"]):
            continue
        if is_call(node, WEIGHTED):
            found = weight_of(graph, node)
            if found is None:
                continue
            weights.append(_weight_site(node, found[0].shape))
        operands = node.args[:1] if is_call(node, WEIGHTED) else node.args[:2]
        for operand in operands:
            if isinstance(operand, fx.Node) and constant(graph, operand) is None:
                readers.setdefault(operand, []).append(node)
                owner.setdefault(operand, node.meta["module"])
    _hoist(nodes, readers, owner)
    roles = dict.fromkeys(readers, "input")
    for node in nodes:
        if _needs_output(graph, node, scope, quantized_outputs) and not is_float(node.meta["module"]):
            readers[node] = list(node.users)
            owner.setdefault(node, node.meta["module"])
            roles.setdefault(node, "output")
    for node in nodes:  # what is a mere rearrangement of quantized values is quantized already
        if is_call(node, LAYOUT) and node in readers and _already(node, readers):
            del readers[node]
    readers = {node: [r for r in found if not meets_pole(r, node)] for node, found in readers.items()}
    activations = [_activation_site(n, readers[n], owner[n], roles[n]) for n in nodes if readers.get(n)]
    return Sites(tuple(weights), tuple(activations))


def kind_of(node: fx.Node) -> str:
    """One of "conv", "linear", "matmul", or the operator's ATen name without overload ("silu", "add", …)."""
    if is_call(node, CONVOLUTIONS):
        return "conv"
    if is_call(node, LINEAR):
        return "linear"
    if is_call(node, MATMUL):
        return "matmul"
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else str(node.op)


def _weight_site(node: fx.Node, size: tuple[int, ...]) -> WeightSite:
    groups = argument(node, "groups", 1) or 1
    depthwise = is_call(node, CONVOLUTIONS) and groups == size[0] and size[1] == 1
    return WeightSite(node.name, node.meta["module"], tuple(size), kind_of(node), depthwise)


def _activation_site(node: fx.Node, readers: list[fx.Node], module: str, role: str) -> ActivationSite:
    axis = channel_axis(node) if is_call(node, WEIGHTED) else (1 if len(shape(node)) == 4 else len(shape(node)) - 1)
    names = tuple(dict.fromkeys(r.name for r in readers))
    return ActivationSite(node.name, module, names, shape(node), axis, role)


def _hoist(nodes: list[fx.Node], readers: dict[fx.Node, list[fx.Node]], owner: dict[fx.Node, str]) -> None:
    """Quantize before a rearrangement rather than after it, where nothing else reads the rearranged value."""
    for node in reversed(nodes):
        if node in readers and is_call(node, _BIJECTIVE) and set(node.users) <= set(readers[node]):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            readers.setdefault(source, []).append(node)
            owner.setdefault(source, owner[node])
            del readers[node]


def _needs_output(graph: fx.GraphModule, node: fx.Node, scope: str, outputs: frozenset[str]) -> bool:
    if "shape" not in node.meta or not node.meta["dtype"].is_floating_point:
        return False
    if any(user.op == "output" for user in node.users):
        return False
    if node.op == "call_function" and kind_of(node) in outputs:
        return True
    return scope == "full" and not is_call(node, LAYOUT) and not _is_masked(graph, node) and not _is_norms(graph, node)


def _is_norms(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a norm takes the node with its input: an offset by channel, added to codes and read by norms alone."""
    if not is_call(node, frozenset({aten.add.Tensor})) or not only_norms_read(node):
        return False
    return any(c is not None and c.ndim == 1 for c in (constant(graph, o) for o in node.all_input_nodes))


def _is_masked(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a constant of -∞, or of numbers that softmax makes zero, is added or chosen."""
    if not is_call(node, frozenset({aten.add.Tensor, aten.where.self})):
        return False
    constants = [constant(graph, operand) for operand in node.all_input_nodes]
    return any(c is not None and c.is_floating_point() and float(c.min()) <= _MASK for c in constants)


def _already(node: fx.Node, readers: dict[fx.Node, list[fx.Node]]) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source in readers:
        return node in readers[source]
    return is_call(source, LAYOUT) and _already(source, readers)


def source_site(sites: Sites, node: fx.Node, position: int) -> str | None:
    """Name of the activation site whose codes reach an operand of `node` through layout operators, or None."""
    readers = {s.value: s.readers for s in sites.activations}
    reader, operand = node, node.args[position]
    while isinstance(operand, fx.Node):
        if reader.name in readers.get(operand.name, ()):
            return operand.name
        if not is_call(operand, LAYOUT):
            return None
        reader, operand = operand, operand.args[0]
    return None
