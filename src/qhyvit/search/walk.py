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
from qhyvit.graph.ops import weight_of
from qhyvit.graph.sites import ActivationSite, WeightSite, source_site
from qhyvit.methods.base import Problem
from qhyvit.progress import task
from qhyvit.quantized import Parameters
from qhyvit.quantizers.base import Quantizer
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.errors import LayerError
from qhyvit.search.layers import layer_errors

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
        done = frozenset(s for s in self._layers if s is not None)
        products = self._components()
        with task("Searching", len(self._layers) + len(products)) as advance:
            for source, names in self._layers.items():
                self._search_layers(source, names, rounds)
                advance(1)
            for names in products:
                self._search_products(names, done, rounds)
                advance(1)

    def _source(self, node: fx.Node, position: int) -> str | None:
        return source_site(self.problem.sites, node, position)

    def _search_layers(self, source: str | None, names: list[str], rounds: int) -> None:
        floats = {name: weight_of(self.problem.graph, self._nodes[name]) for name in names}
        errors = layer_errors(self.problem.graph, {n: self.samples[n] for n in names}, kind=self._error)
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

    def _search_products(self, names: list[str], done: frozenset[str], rounds: int) -> None:
        """Products that share values; the error of a value is summed over all that it feeds."""
        feeds = {name: [self._source(self._nodes[name], i) for i in range(2)] for name in names}
        wanted = dict.fromkeys(s for sources in feeds.values() for s in sources if s is not None and s not in done)
        for _ in range(rounds):
            before = [self.parameters.activations[s] for s in wanted]
            for source in wanted:
                site = self._activations[source]
                fixed = {n: self._other_operands(n, feeds[n], source, site) for n in names if source in feeds[n]}

                def error(q: Quantizer, fixed: dict[str, list[Tensor | None]] = fixed) -> Tensor:
                    found = []
                    for name, (a, b) in fixed.items():
                        sample: ProductSample = self.samples[name]
                        a, b = (q(sample.a) if a is None else a), (q(sample.b) if b is None else b)
                        found.append(self.chooser.product_error(sample, a, b))
                    return torch.stack(found).sum()

                chosen = self.chooser.activation(site, self.parameters.activations[source], error)
                self.parameters.activations[source] = chosen
            if all(self.parameters.activations[s] is b for s, b in zip(wanted, before, strict=True)):
                break

    def _other_operands(
        self, name: str, sources: list[str | None], source: str, site: ActivationSite
    ) -> list[Tensor | None]:
        """Operands that do not come from `source`, as the product sees them meanwhile; None for those that do."""
        sample: ProductSample = self.samples[name]
        plain = self.chooser.beside_float(site)
        return [
            None if s == source else values if plain else self._through(s, values)
            for s, values in zip(sources, (sample.a, sample.b), strict=True)
        ]

    def _components(self) -> list[list[str]]:
        """Products grouped so that groups have no value in common."""
        groups: list[tuple[set[str], list[str]]] = []
        for name in self._products:
            sources = {s for i in range(2) if (s := self._source(self._nodes[name], i)) is not None}
            joined = [g for g in groups if g[0] & sources]
            groups = [g for g in groups if not g[0] & sources]
            names = [n for _, members in joined for n in members]
            groups.append((sources.union(*(g[0] for g in joined)), [*names, name]))
        return [members for _, members in groups]

    def _through(self, source: str | None, values: Tensor) -> Tensor:
        if source is None:
            return values
        coded: Tensor = self.parameters.activations[source](values)
        return coded


def _total(error: LayerError, x: Tensor, weight: Tensor) -> Tensor:
    """Error () of a whole layer: its own idea of it, where it has one, else the sum over its channels."""
    whole: Callable[[Tensor, Tensor], Tensor] | None = getattr(error, "whole", None)
    return error(x, weight).sum() if whole is None else whole(x, weight)
