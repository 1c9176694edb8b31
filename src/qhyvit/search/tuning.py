"""Weights of a unit tuned by gradient towards its outputs in the float network; norms and all steps stay.

The smooth optimization strategy of I&S-ViT (arXiv 2311.10126) does so twice: with float weights, then with quantized
ones, whose gradient is straight-through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhyvit.graph.blocks import Unit
from qhyvit.graph.ops import weight_of
from qhyvit.search.prefix import Execution
from qhyvit.search.reconstruction import Batch, drawn, relative_error


@dataclass(frozen=True)
class Settings:
    """How weights are tuned.

    Attributes:
        iterations: of Adam.
        rate: learning rate, falling to 0 by a cosine.
    """

    iterations: int
    rate: float


class TunedUnit:
    """One unit: activations through their quantizers, weights as they are given.

    Args:
        execution: the net, whose constants (biases, norms) count, and the quantizers.
        unit: the unit.
    """

    def __init__(self, execution: Execution, unit: Unit) -> None:
        inside = set(unit.nodes)
        self.execution, self.unit = execution, unit
        self.nodes = [n for n in execution.graph.graph.nodes if n.name in inside]

    def weights(self) -> dict[str, Tensor]:
        """The float weights of the unit's layers that are quantized, by node, as the graph has them."""
        found = {n.name: weight_of(self.execution.graph, n) for n in self.nodes if n.name in self.execution.layers}
        return {name: values[0] for name, values in found.items() if values is not None}

    def outputs(self, inputs: dict[str, Any], weights: dict[str, Tensor], *, coded: bool) -> list[Tensor]:
        """The unit's outputs.

        Args:
            inputs: values that it reads, by name.
            weights: of its layers, by node.
            coded: whether weights go through their quantizers.
        """
        values = dict(inputs)
        for node in self.nodes:
            args, kwargs = self.execution.operands(node, values)
            if node.name in weights:
                weight = weights[node.name]
                args[1] = self.execution.parameters.weights[node.name](weight) if coded else weight
            values[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [values[name] for name in self.unit.outputs if isinstance(values[name], Tensor)]

    @torch.enable_grad()
    def tune(
        self, batches: list[Batch], settings: Settings, generator: torch.Generator, *, coded: bool
    ) -> dict[str, Tensor]:
        """Weights, by node, that bring the outputs nearer to those of the float network; nothing is written.

        Args:
            batches: what is learned from.
            settings: how.
            generator: what the order of the batches is drawn from.
            coded: whether weights are quantized meanwhile, on inputs from the quantized network; the gradient passes
                where they are rounded, not clipped. Else weights and inputs are float.
        """
        weights = {name: w.detach().clone().requires_grad_() for name, w in self.weights().items()}
        optimizer = torch.optim.Adam(list(weights.values()), lr=settings.rate)
        for i, batch in enumerate(drawn(batches, settings.iterations, generator)):
            optimizer.param_groups[0]["lr"] = settings.rate * (1 + math.cos(math.pi * i / settings.iterations)) / 2
            found = self.outputs(batch.noisy if coded else batch.clean, weights, coded=coded)
            optimizer.zero_grad()
            relative_error(found, batch.targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: w.detach() for name, w in weights.items()}

    @torch.no_grad()
    def error(self, batches: list[Batch]) -> float:
        """Error in the quantized network as a share of the targets' square, with the graph's weights."""
        weights = self.weights()
        errors = [relative_error(self.outputs(b.noisy, weights, coded=True), b.targets) for b in batches]
        return float(torch.stack(errors).mean())
