"""What each operator loses: alone, and in the quantized net (PPQ's layer-wise and graph-wise error).

An operator quantized alone on exact inputs shows what its own codes cost, its bias corrected for them where the method
corrects biases; its output in the quantized net holds the noise of all operators before it too. Where the first number
is low, the operator's ranges or widths are at fault; where only the second is, noise has piled up.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.calibration.bias import correct_biases
from qhyvit.calibration.collect import Watcher
from qhyvit.data.dataset import Dataset
from qhyvit.evaluation import opened, rounded, sqnr, stream
from qhyvit.graph.ops import aten, is_call, only_activation
from qhyvit.progress import task
from qhyvit.quantized import QuantizedModel
from qhyvit.search.prefix import Execution

PICTURES = 32


@dataclass(frozen=True)
class Loss:
    """One operator.

    Attributes:
        node, module: its names in the graph and in the model.
        alone_db: SQNR of its output with nothing but its weight and operands quantized, in dB.
        in_net_db: SQNR of its output in the quantized net, in dB.
        logits_db: SQNR of the logits with nothing but its weight and operands quantized, in dB.
        share: its part of the squared errors that all operators, each alone, cause in the logits.

    Outputs are compared behind the activation function that alone reads them, where there is one: what ReLU6 cuts off,
    codes before it have cut off already.
    """

    node: str
    module: str
    alone_db: float
    in_net_db: float
    logits_db: float
    share: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, rounded to 6 digits, JSON-able."""
        return rounded(asdict(self))


def losses(
    model: QuantizedModel, data: Dataset | str | Path | None = None, *, limit: int = PICTURES, batch: int = 8
) -> list[Loss]:
    """What every operator with a quantized operand or weight loses, the largest share first.

    Args:
        model: a quantized model.
        data: pictures, as for `evaluate`; labels do not matter.
        limit: so many pictures, drawn with a fixed seed. What lies behind an operator is run on them once for each.
        batch: pictures at a time; all inner values of the net are held for so many.

    Raises:
        DataError: if no picture can be read.
    """
    pictures = [item.images for item in stream(model, opened(model, data), "Reading", limit, batch)]
    nodes = _operators(model)
    alone_in_float, reached, logits = _Alone(model, pictures), _reached(model.graph), _logits(model.graph)
    simulation = model.simulation()
    signal, whole, alone, behind = (defaultdict[str, float](float) for _ in range(4))
    activated = defaultdict(lambda: _itself, {n.name: f for n in nodes if (f := only_activation(n)) is not None})
    with torch.inference_mode(), task("Measuring losses", len(nodes) * len(pictures)) as advance:
        for images in pictures:
            exact = _values(model.graph, images)
            for name in {logits, *(n.name for n in nodes)}:
                signal[name] += _squared(activated[name](exact[name]))

            def compare(node: fx.Node, value: Any, exact: dict[str, Any] = exact) -> None:
                seen = activated[node.name]
                whole[node.name] += _squared(seen(value), seen(exact[node.name]))

            Watcher(simulation, (n.name for n in nodes), compare).run(images)
            for node in nodes:
                values = ChainMap({node.name: alone_in_float(node, exact)}, exact)
                for later in reached[node]:
                    values[later.name] = alone_in_float.execution.float_value(later, values)
                seen = activated[node.name]
                alone[node.name] += _squared(seen(values[node.name]), seen(exact[node.name]))
                behind[node.name] += _squared(values[logits], exact[logits])
                advance(1)
    total = sum(behind.values()) or 1.0
    found = [
        Loss(
            node.name,
            node.meta.get("module") or "",
            sqnr(signal[node.name], alone[node.name]),
            sqnr(signal[node.name], whole[node.name]),
            sqnr(signal[logits], behind[node.name]),
            behind[node.name] / total,
        )
        for node in nodes
    ]
    return sorted(found, key=lambda loss: -loss.share)


def _operators(model: QuantizedModel) -> list[fx.Node]:
    """Everything that has a quantized weight or reads a quantized value, but for its size."""
    names = {s.node for s in model.sites.weights} | {r for s in model.sites.activations for r in s.readers}
    return [n for n in model.graph.graph.nodes if n.name in names and not is_call(n, aten.sym_size.int)]


def _logits(graph: fx.GraphModule) -> str:
    """Name of the node that the graph returns."""
    (logits,) = graph.graph.output_node().all_input_nodes
    return logits.name


def _reached(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """The operators behind each node, in graph order."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(graph.graph.nodes):
        users = [u for u in node.users if u.op != "output"]
        found[node] = set(users).union(*(found[u] for u in users))
    return {node: [n for n in graph.graph.nodes if n in behind] for node, behind in found.items()}


class _Alone:
    """Single operators with quantized weight and operands in the float net.

    Biases make up for each layer's own codes, where the model's biases make up for its and for what came before it.
    """

    def __init__(self, model: QuantizedModel, pictures: list[Tensor]) -> None:
        single = replace(model, parameters=replace(model.parameters, biases={}), integer_bias=False)
        if model.parameters.biases:
            correct_biases(single, pictures, alone=True)
        self.execution, self.forms = Execution(single, single.parameters), single.parameters.operators

    def __call__(self, node: fx.Node, exact: dict[str, Any]) -> Any:
        """What the operator computes from the float net's values."""
        form = self.forms.get(node.name)
        if form is None:
            return self.execution.quantized_value(node, exact)
        return form(self.execution.operands(node, exact)[0][0])


def _values(graph: fx.GraphModule, images: Tensor) -> dict[str, Any]:
    """All inner values of a graph, by node name."""
    found: dict[str, Any] = {}

    def keep(node: fx.Node, value: Any) -> None:
        found[node.name] = value

    Watcher(graph, (n.name for n in graph.graph.nodes), keep).run(images)
    return found


def _itself(value: Any) -> Any:
    return value


def _squared(value: Any, exact: Any = None) -> float:
    """Sum of squares, of the difference if there is another value; of a list of parts the first one's."""
    if isinstance(value, (tuple, list)):
        value, exact = value[0], None if exact is None else exact[0]
    return float((value.double() if exact is None else value.double() - exact.double()).square().sum())
