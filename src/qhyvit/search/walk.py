"""Layer-wise search in the float network: weights and inputs in turn, then products, by what a method makes of each.

Each layer sees float inputs and has its float output as target, so that layers do not depend on each other, save those
that read the same value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qhyvit.calibration.samples import LayerSample, ProductSample
from qhyvit.graph.ops import CONVOLUTIONS, is_call, weight_of
from qhyvit.graph.sites import ActivationSite, WeightSite, source_site
from qhyvit.methods.base import Problem
from qhyvit.progress import task
from qhyvit.quantized import Parameters
from qhyvit.quantizers.base import Quantizer
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.operands import LayerError

WeightErrors = Callable[[UniformAffine], Tensor]
"""Error of each output channel (C_out,)."""
ActivationError = Callable[[Quantizer], Tensor]
"""Error (), summed over all layers that read the value."""


class Chooser(Protocol):
    """What a method decides; it returns the quantizer it was given to keep it."""

    def weight(
        self, site: WeightSite, weight: Tensor, current: UniformAffine, errors: WeightErrors
    ) -> UniformAffine: ...

    def activation(self, site: ActivationSite, current: Quantizer, error: ActivationError) -> Quantizer: ...

    def product_error(self, sample: ProductSample, a: Tensor, b: Tensor) -> Tensor:
        """Error () of a product of activations with these operands."""
        ...

    def beside_float(self, site: ActivationSite) -> bool:
        """Whether this operand of a product is chosen while the other is float."""
        ...


class Walk:
    """The search over one problem.

    Args:
        problem: the net.
        parameters: where it begins; changed in place.
        samples: of `gather.gather`.
        chooser: the method.
        error: how the error of a layer is measured.
    """

    def __init__(
        self,
        problem: Problem,
        parameters: Parameters,
        samples: dict[str, Any],
        chooser: Chooser,
        error: type[LayerError] = LayerError,
    ) -> None:
        self.problem, self.parameters, self.samples, self.chooser = problem, parameters, samples, chooser
        self._error = error
        self._nodes = {n.name: n for n in problem.graph.graph.nodes}
        self._weights = {s.node: s for s in problem.sites.weights}
        self._activations = {s.value: s for s in problem.sites.activations}
        self._layers: dict[str | None, list[str]] = {}
        for name in self._weights:
            if isinstance(samples.get(name), LayerSample):
                self._layers.setdefault(self._source(self._nodes[name], 0), []).append(name)
        self._products = [n for n, s in samples.items() if isinstance(s, ProductSample)]

    @property
    def searched(self) -> set[str]:
        """Values whose quantizer a layer or product decides; the others stay as they were."""
        found = {s for s in self._layers if s is not None}
        for name in self._products:
            found |= {s for i in range(2) if (s := self._source(self._nodes[name], i)) is not None}
        return found

    def run(self, rounds: int) -> None:
        """Alternate until nothing changes, `rounds` times at most."""
        done: set[str] = set()
        with task("Searching", len(self._layers) + len(self._products)) as advance:
            for source, names in self._layers.items():
                self._search_layers(source, names, rounds)
                done |= {source} - {None}  # type: ignore[arg-type]
                advance(1)
            for name in self._products:
                done |= self._search_product(name, frozenset(done), rounds)
                advance(1)

    def _source(self, node: fx.Node, position: int) -> str | None:
        return source_site(self.problem.sites, node, position)

    def _search_layers(self, source: str | None, names: list[str], rounds: int) -> None:
        floats = {name: weight_of(self.problem.graph, self._nodes[name]) for name in names}
        errors = {name: self._layer_error(name) for name in names}
        for _ in range(rounds):
            before = self._held(source, names)
            for name in names:
                error, weight = errors[name], floats[name][0]  # type: ignore[index]
                x = self._through(source, error.x)

                def of_weight(q: UniformAffine, e: LayerError = error, w: Tensor = weight, x: Tensor = x) -> Tensor:
                    return e(x, e.grouped(q(w)))

                current = self.parameters.weights[name]
                chosen = self.chooser.weight(self._weights[name], weight, current, of_weight)
                self.parameters.weights[name] = chosen
            if source is not None:
                coded = {n: errors[n].grouped(self.parameters.weights[n](floats[n][0])) for n in names}  # type: ignore[index]

                def of_input(q: Quantizer, coded: dict[str, Tensor] = coded) -> Tensor:
                    return torch.stack([_total(errors[n], q(errors[n].x), w) for n, w in coded.items()]).sum()

                site = self._activations[source]
                chosen_input = self.chooser.activation(site, self.parameters.activations[source], of_input)
                self.parameters.activations[source] = chosen_input
            if all(a is b for a, b in zip(before, self._held(source, names), strict=True)):
                break

    def _held(self, source: str | None, names: list[str]) -> list[Quantizer | None]:
        return [self.parameters.activations.get(source or ""), *(self.parameters.weights[n] for n in names)]

    def _search_product(self, name: str, done: frozenset[str], rounds: int) -> set[str]:
        sample: ProductSample = self.samples[name]
        sources = [self._source(self._nodes[name], i) for i in range(2)]
        for _ in range(rounds):
            before = [self.parameters.activations.get(s or "") for s in sources]
            for position, source in enumerate(sources):
                if source is None or source in done:
                    continue
                site = self._activations[source]
                values = (sample.a, sample.b)[1 - position]
                other = values if self.chooser.beside_float(site) else self._through(sources[1 - position], values)

                def error(q: Quantizer, position: int = position, other: Tensor = other) -> Tensor:
                    a, b = (q(sample.a), other) if position == 0 else (other, q(sample.b))
                    return self.chooser.product_error(sample, a, b)

                chosen = self.chooser.activation(site, self.parameters.activations[source], error)
                self.parameters.activations[source] = chosen
            if all(self.parameters.activations.get(s or "") is b for s, b in zip(sources, before, strict=True)):
                break
        return {s for s in sources if s is not None}

    def _through(self, source: str | None, values: Tensor) -> Tensor:
        if source is None:
            return values
        coded: Tensor = self.parameters.activations[source](values)
        return coded

    def _layer_error(self, name: str) -> LayerError:
        node = self._nodes[name]
        weight, bias = weight_of(self.problem.graph, node)  # type: ignore[misc]
        groups, k = self.samples[name].x.shape[1:]
        taps = weight[0, 0].numel() if is_call(node, CONVOLUTIONS) else 1
        channel_of = torch.arange(groups * k).div(taps, rounding_mode="floor").view(groups, k)
        return self._error(self.samples[name], weight, bias, channel_of)


def _total(error: LayerError, x: Tensor, weight: Tensor) -> Tensor:
    """Error () of a whole layer: its own idea of it, where it has one, else the sum over its channels."""
    whole: Callable[[Tensor, Tensor], Tensor] | None = getattr(error, "whole", None)
    return error(x, weight).sum() if whole is None else whole(x, weight)
