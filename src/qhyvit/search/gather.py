"""One walk over the calibration pictures that samples every operator and every quantized value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.calibration.collect import Collector, Watcher
from qhyvit.calibration.gradients import Source, gradients, kl_to_float, sampled_label_loss
from qhyvit.calibration.samples import (
    normalised,
    sample_layer,
    sample_product,
    sample_value,
)
from qhyvit.graph.ops import LINEAR, MATMUL, argument, constant, is_call, shape, weight_of
from qhyvit.graph.sites import Sites, source_site
from qhyvit.methods.base import Problem
from qhyvit.methods.ranges import set_ranges
from qhyvit.progress import task
from qhyvit.quantized import QuantizedModel

BATCH = 4  # pictures at a time: all inner gradients of a batch are held at once
SLICES = 128  # heads × pictures kept of a product of activations
ROWS = 16  # of each: all of them read the same other operand
VALUES = 32768
GROUPED = 1 << 19  # inputs kept of a convolution with groups, each of which is a small layer that few positions tell of


class Gradients:
    """∂L/∂value of inner values of a net, from one of the sources.

    Args:
        problem: the net; its recipe's seed draws labels.
        source: "default_quant" (Q-HyViT's), "fisher", "float" (rounding noise, as the released code's), or "none".
    """

    def __init__(self, problem: Problem, source: Source) -> None:
        self._graph, self._source = problem.graph, source
        self._default = _default_quantized(problem) if source == "default_quant" else problem.graph
        self._generator = torch.Generator().manual_seed(problem.recipe.seed)

    def of(self, names: set[str], images: Tensor) -> dict[str, Tensor]:
        """By name, in the value's shape; nothing for source "none"."""
        if self._source == "none":
            return {}
        with torch.no_grad():
            reference = self._graph(images)
        if self._source == "fisher":
            return gradients(self._graph, names, images, sampled_label_loss(reference, self._generator))
        return gradients(self._default, names, images, kl_to_float(reference))


def gather(
    problem: Problem,
    source: Source,
    positions: int,
    *,
    graph: fx.GraphModule | None = None,
    only_layers: bool = False,
) -> dict[str, Any]:
    """Samples by node name (layers and products) and by "value:" + name (all activation sites).

    On the way it gathers the problem's statistics, if they are not known yet.

    Args:
        problem: the net; its recipe's seed draws the positions.
        source: where gradients come from.
        positions: to keep per layer.
        only_layers: leave out products and single values.
        graph: where inputs and outputs are sampled, with the nodes of the problem's; default: the float graph.

    Raises:
        ModelError: if a value is not finite where statistics are gathered; names the layer.
    """
    g = Gradients(problem, source)
    known = graph is not None or "statistics" in vars(problem)
    collector = Collector(Sites((), ()) if known else problem.sites, channels=problem.wants_channels)
    graph = problem.graph if graph is None else graph
    layers = [s.node for s in problem.sites.weights if _supported(problem.graph, s.node)]
    products = [n.name for n in problem.graph.graph.nodes if is_call(n, MATMUL) and _has_site(problem, n)]
    values = [s.value for s in problem.sites.activations]
    if only_layers:
        products, values = [], []
    generator = torch.Generator().manual_seed(problem.recipe.seed)
    parts: dict[str, list[Any]] = {}
    share = BATCH / max(problem.picture_count, BATCH)
    with task("Sampling", problem.picture_count) as advance:
        for batch in problem.pictures():
            for images in torch.split(batch, BATCH):
                found = g.of({*layers, *products, *values}, images)
                _sample(graph, images, found, (layers, products, values), share, positions, generator, parts, collector)
                advance(len(images))
    if not known:
        problem.statistics = collector.statistics
    return {name: _joined(found) for name, found in parts.items()}


def _default_quantized(problem: Problem) -> fx.GraphModule:
    """The network quantized with default parameters: min-max, weights per channel, activations per tensor."""
    return QuantizedModel(
        problem.graph, problem.sites, set_ranges(problem, "minmax"), problem.recipe, {}, False
    ).simulation(integer=False)


def _sample(
    graph: fx.GraphModule,
    images: Tensor,
    g: dict[str, Tensor],
    names: tuple[list[str], list[str], list[str]],
    share: float,
    positions: int,
    generator: torch.Generator,
    parts: dict[str, list[Any]],
    collector: Collector,
) -> None:
    """Run the float network on one batch and sample it."""
    layers, products, values = (frozenset(n) for n in names)
    nodes = {n.name: n for n in graph.graph.nodes}
    operands = {a.name for n in (*layers, *products) for a in nodes[n].all_input_nodes if a.op != "get_attr"}
    seen: dict[str, Tensor] = {}

    def operand(of: Any) -> Tensor:
        fixed = constant(graph, of)  # such as a table of relative positions
        return seen[of.name] if fixed is None else fixed

    def watch(node: fx.Node, value: Tensor) -> None:
        gradient = g.get(node.name)
        if node.name in collector.statistics:
            collector(node, value)
        if node.name in operands:
            seen[node.name] = value
        if node.name in values:
            found = sample_value(value, gradient, math.ceil(VALUES * share), generator)
            parts.setdefault(f"value:{node.name}", []).append(found)
        if node.name in layers:
            x = operand(node.args[0])
            count = math.ceil(min(positions, _enough(graph, node)) * share)
            layer = sample_layer(graph, node, x, value, gradient, count, generator)
            parts.setdefault(node.name, []).append(layer)
        if node.name in products:
            a, b = (operand(arg) for arg in node.args[:2])
            product = sample_product(a, b, value, gradient, math.ceil(SLICES * share), ROWS, generator)
            parts.setdefault(node.name, []).append(product)

    with torch.no_grad():
        Watcher(graph, {*layers, *products, *values, *operands, *collector.statistics}, watch).run(images)


def _enough(graph: fx.GraphModule, node: fx.Node) -> int:
    """How many positions of a layer are plenty."""
    groups, (weight, _) = argument(node, "groups", 1) or 1, weight_of(graph, node)  # type: ignore[misc]
    return max(64, GROUPED // (groups * weight[0].numel())) if groups > 1 else 1 << 62


def _joined(parts: list[Any]) -> Any:
    """The samples of all batches as one, weights with mean 1."""
    kind = type(parts[0])
    fields = {name: torch.cat([getattr(p, name) for p in parts]) for name in kind.__dataclass_fields__}
    fields["weight"] = normalised(fields["weight"])
    return kind(**fields)


def _supported(graph: fx.GraphModule, name: str) -> bool:
    """Linears and two-dimensional convolutions can be sampled."""
    node = next(n for n in graph.graph.nodes if n.name == name)
    return is_call(node, LINEAR) or len(shape(node)) == 4


def _has_site(problem: Problem, node: fx.Node) -> bool:
    return any(source_site(problem.sites, node, i) is not None for i in range(2))
