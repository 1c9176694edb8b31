"""What each operator loses: alone, and in the quantized net (PPQ's layer-wise and graph-wise error).

An operator quantized alone on exact inputs shows what its own codes cost, its bias corrected for them where the method
corrects biases; its output in the quantized net holds the noise of all operators before it too. Where the first number
is low, the operator's ranges or widths are at fault; where only the second is, noise has piled up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.calibration.bias import correct_biases
from qhyvit.calibration.collect import Watcher
from qhyvit.data.dataset import Dataset
from qhyvit.evaluation import opened, rounded, sqnr, stream
from qhyvit.graph.ops import aten, is_call
from qhyvit.graph.sites import Sites
from qhyvit.progress import task
from qhyvit.quantized import Parameters, QuantizedModel

PICTURES = 32
OUTPUT = "output"  # what fx calls the node that returns the logits


@dataclass(frozen=True)
class Loss:
    """One operator.

    Attributes:
        node, module: its names in the graph and in the model.
        alone_db: SQNR of its output with nothing but its weight and operands quantized, in dB.
        in_net_db: SQNR of its output in the quantized net, in dB.
        logits_db: SQNR of the logits with nothing but its weight and operands quantized, in dB.
        share: its part of the squared errors that all operators, each alone, cause in the logits.
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
        limit: so many pictures, drawn with a fixed seed. The net is run on them once for each operator.
        batch: pictures at a time; the outputs of all operators are held for so many.

    Raises:
        DataError: if no picture can be read.
    """
    pictures = [item.images for item in stream(model, opened(model, data), "Reading", limit, batch)]
    operators = _operators(model.sites)
    nodes = [n for n in model.graph.graph.nodes if n.name in operators and not is_call(n, aten.sym_size.int)]
    names = [n.name for n in nodes]
    single = _correct_alone(model, pictures)
    signal, whole, alone, behind = (defaultdict[str, float](float) for _ in range(4))
    with task("Measuring losses", len(nodes) * len(pictures)) as advance:
        for images in pictures:
            exact: dict[str, Tensor] = {}
            _run(model.graph, [*names, OUTPUT], images, exact.__setitem__)
            for name, value in exact.items():
                signal[name] += float(value.double().square().sum())
            for name, noise in _noise(model.simulation(), names, images, exact).items():
                whole[name] += noise
            for node in nodes:
                own = _noise(_only(single, node.name), [node.name, OUTPUT], images, exact)
                alone[node.name] += own[node.name]
                behind[node.name] += own[OUTPUT]
                advance(1)
    total = sum(behind.values()) or 1.0
    found = [
        Loss(
            node.name,
            node.meta.get("module") or "",
            sqnr(signal[node.name], alone[node.name]),
            sqnr(signal[node.name], whole[node.name]),
            sqnr(signal[OUTPUT], behind[node.name]),
            behind[node.name] / total,
        )
        for node in nodes
    ]
    return sorted(found, key=lambda loss: -loss.share)


def _operators(sites: Sites) -> set[str]:
    """Everything that has a quantized weight or reads a quantized value."""
    return {s.node for s in sites.weights} | {r for s in sites.activations for r in s.readers}


def _correct_alone(model: QuantizedModel, pictures: list[Tensor]) -> QuantizedModel:
    """The model with biases that make up for each layer's own codes, instead of those that answer other layers too."""
    single = replace(model, parameters=replace(model.parameters, biases={}))
    if model.parameters.biases:
        correct_biases(single, pictures, alone=True)
    return single


def _only(model: QuantizedModel, operator: str) -> fx.GraphModule:
    """The float net with one operator's weight and operands quantized."""
    sites = Sites(
        tuple(s for s in model.sites.weights if s.node == operator),
        tuple(replace(s, readers=(operator,)) for s in model.sites.activations if operator in s.readers),
    )
    chosen = model.parameters
    own = {name: form for name, form in chosen.operators.items() if name == operator}
    biases = {name: bias for name, bias in chosen.biases.items() if name == operator}
    parameters = Parameters(chosen.activations, chosen.weights, chosen.codes, biases, operators=own)
    return QuantizedModel(model.graph, sites, parameters, model.recipe, model.info, False).simulation()


def _run(graph: fx.GraphModule, names: list[str], images: Tensor, keep: Callable[[str, Tensor], Any]) -> None:
    """Run a graph and hand over the values of some nodes."""

    def watch(node: fx.Node, value: Any) -> None:
        keep(node.name, value[0] if isinstance(value, tuple) else value)

    with torch.inference_mode():
        Watcher(graph, names, watch).run(images)


def _noise(graph: fx.GraphModule, names: list[str], images: Tensor, exact: dict[str, Tensor]) -> dict[str, float]:
    """Summed squared differences of some nodes' values from the exact ones."""
    found: dict[str, float] = {}

    def compare(name: str, value: Tensor) -> None:
        found[name] = float((value.double() - exact[name].double()).square().sum())

    _run(graph, names, images, compare)
    return found
