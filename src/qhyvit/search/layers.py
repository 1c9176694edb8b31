"""The search over all sites of a net, operator by operator, on samples of the float network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.calibration.samples import LayerSample, ProductSample, ValueSample
from qhyvit.graph.channels import consumers
from qhyvit.graph.ops import CONVOLUTIONS, WEIGHTED, is_call, only_activation, weight_of
from qhyvit.graph.sites import ActivationSite, WeightSite, source_site
from qhyvit.methods.base import Problem
from qhyvit.quantized import Parameters
from qhyvit.quantizers.uniform import uniform_from_range
from qhyvit.search.candidates import Candidates
from qhyvit.search.errors import InputError, LayerError, WeightError, in_chunks, product_error, product_errors
from qhyvit.search.operands import Choice, Evaluate, Range, Space, search

ActivationSpace = Callable[[ActivationSite], Space]
WeightSpace = Callable[[WeightSite], Space]


@dataclass(frozen=True)
class Spaces:
    """What may be chosen for each site.

    Attributes:
        weight, activation: the space of a site.
        rounds: alternations of the operands; the first one searches the whole space, later ones around the incumbent,
            unless `space.coarse` is 1 (brute force).
        centred: measure layers without their mean error, see `search.errors`.
    """

    weight: WeightSpace
    activation: ActivationSpace
    rounds: int = 3
    centred: bool = False


def layer_errors(
    graph: fx.GraphModule, samples: dict[str, Any], *, centred: bool = False, kind: type[LayerError] = LayerError
) -> dict[str, LayerError]:
    """The error, of one kind, of every sampled layer, by node name."""
    found = {}
    for node in graph.graph.nodes:
        sample = samples.get(node.name)
        if not isinstance(sample, LayerSample):
            continue
        weight, bias = weight_of(graph, node)  # type: ignore[misc]
        groups, k = sample.x.shape[1:]
        taps = weight[0, 0].numel() if is_call(node, CONVOLUTIONS) else 1
        channel_of = torch.arange(groups * k).div(taps, rounding_mode="floor").view(groups, k)
        found[node.name] = kind(sample, weight, bias, channel_of, centred=centred)
    return found


class LayerSearch:
    """The search over all sites of one problem; `units` are independent of each other.

    Args:
        problem: the net.
        parameters: incumbents, replaced by what is found.
        samples: what `gather` gave.
        spaces: what may be chosen.
    """

    def __init__(self, problem: Problem, parameters: Parameters, samples: dict[str, Any], spaces: Spaces) -> None:
        self.problem, self.parameters, self.samples, self.spaces = problem, parameters, samples, spaces
        self.nodes = {n.name: n for n in problem.graph.graph.nodes}
        self.weights = {s.node: s for s in problem.sites.weights}
        self.activations = {s.value: s for s in problem.sites.activations}
        self.units = list(self._units())

    def _units(self) -> Iterator[Callable[[], None]]:
        inputs = {name: self._sites_of(self.nodes[name]) for name in self.samples if name in self.nodes}
        layers: dict[str | None, list[str]] = {}
        for name in self.weights:
            if isinstance(self.samples.get(name), LayerSample):
                layers.setdefault(inputs[name][0], []).append(name)
        for source, names in layers.items():
            yield partial(self.layers, source, names)
        done = {s for s in layers if s is not None}
        products = [n for n, sample in self.samples.items() if isinstance(sample, ProductSample)]
        for names in _linked(products, {n: {i for i in inputs[n] if i is not None} - done for n in products}):
            yield partial(self._products, names, inputs, frozenset(done))
        done |= {i for n in products for i in inputs[n] if i is not None}
        for key, sample in self.samples.items():
            name = key.removeprefix("value:")
            if isinstance(sample, ValueSample) and name not in done:
                yield partial(self._value, name, sample)

    def _sites_of(self, node: fx.Node) -> list[str | None]:
        count = 1 if is_call(node, WEIGHTED) else 2
        return [source_site(self.problem.sites, node, i) for i in range(count)]

    # One input with all layers that read it -----------------------------------------------------------------------

    def layers(self, source: str | None, names: list[str]) -> None:
        """Weights of some layers and their common input, in turn."""
        samples = {n: self.samples[n] for n in names}
        errors = layer_errors(self.problem.graph, samples, centred=self.spaces.centred)
        chosen, by_channel = self.parameters, True
        if source is not None:
            by_channel = self._channels_are_inputs(self.activations[source], names)
            self._per_tensor_unless(by_channel, source)
        for round_ in range(self.spaces.rounds):
            before = [chosen.activations.get(source or ""), *(chosen.weights[n] for n in names)]
            for name in names:
                self._weight(name, errors[name], source, round_)
            if source is not None:
                self._activation(source, names, errors, round_, by_channel)
            after = [chosen.activations.get(source or ""), *(chosen.weights[n] for n in names)]
            if all(a is b for a, b in zip(before, after, strict=True)):
                break

    def layer(self, name: str) -> None:
        """One layer and its input alone."""
        self.layers(self._sites_of(self.nodes[name])[0], [name])

    def float_weight(self, name: str) -> Tensor:
        """The float weight of a layer."""
        found = weight_of(self.problem.graph, self.nodes[name])
        assert found is not None
        return found[0]

    def _weight(self, name: str, error: LayerError, source: str | None, round_: int) -> None:
        weight, incumbent = self.float_weight(name), self.parameters.weights[name]
        x = error.quantized_input(self.parameters.uniform(source) if source is not None else None)
        evaluate = WeightError(error, x, weight)
        rows = weight.flatten(1)
        extremes = Range(weight.min(), weight.max(), rows.amin(1), rows.amax(1), 0)
        start = Choice(incumbent, float(evaluate(Candidates.of(incumbent)).sum()))
        space = self.spaces.weight(self.weights[name])
        found = search(space, extremes, evaluate, start, separable=True, cost=evaluate.cost, again=round_ > 0)
        self.parameters.weights[name] = found.quantizer

    def _activation(
        self, source: str, names: list[str], errors: dict[str, LayerError], round_: int, by_channel: bool
    ) -> None:
        weights = {n: errors[n].grouped(self.parameters.weights[n](self.float_weight(n))) for n in names}
        by_channel = by_channel and "per-channel" in self.spaces.activation(self.activations[source]).granularities
        separable = by_channel and len(names) == 1 and self.weights[names[0]].depthwise
        inputs = [InputError(errors[n], weights[n], each=separable) for n in names]

        def evaluate(candidates: Candidates) -> Tensor:
            return torch.cat([error(candidates) for error in inputs], 1)

        cost, site = sum(errors[n].cost for n in names), self.activations[source]
        self._choose(site, evaluate, round_, cost, separable=separable, per_channel=by_channel)

    def _channels_are_inputs(self, site: ActivationSite, names: list[str]) -> bool:
        """Whether channel c of a value is input channel c of all layers; behind attention its axis may be the heads."""
        layers = consumers(self.problem.graph, self.nodes[site.value], site.channel_axis, site.readers) or []
        same = [node.name for node, index in layers if torch.equal(index, torch.arange(len(index)))]
        return set(names) <= set(same)

    def _per_tensor_unless(self, allowed: bool, source: str) -> None:
        """Begin with one scale where the search cannot code a sample with several."""
        incumbent, statistics = self.parameters.uniform(source), self.problem.statistics[source]
        if incumbent.axis is not None and not allowed:
            self.parameters.activations[source] = uniform_from_range(
                statistics.low,
                statistics.high,
                bits=incumbent.bits,
                scheme=incumbent.scheme,
                signed=incumbent.signed,
                zero=self.problem.recipe.ranges.zero,
            )

    # Products of activations and single values -------------------------------------------------------------------

    def _products(self, names: list[str], inputs: dict[str, list[str | None]], done: frozenset[str]) -> None:
        """Operands of some products, in turn, each by the errors of all these products that read it.

        Queries, keys and values may be one site: what is best for the scores alone is not for what they weigh.
        """
        free = [s for s in dict.fromkeys(i for n in names for i in inputs[n]) if s is not None and s not in done]
        by_head = {s: all(self._is_by_head(n, s) for n in names if s in inputs[n]) for s in free}
        for site in free:
            self._per_tensor_unless(by_head[site], site)
        for round_ in range(self.spaces.rounds):
            before = [self.parameters.activations[s] for s in free]
            for site in free:
                readers = [n for n in names if site in inputs[n]]
                errors = [self._product_errors(n, inputs[n], site) for n in readers]

                def evaluate(candidates: Candidates, errors: list[Evaluate] = errors) -> Tensor:
                    return torch.cat([error(candidates) for error in errors], 1)

                cost = sum(self.samples[n].a.shape[-1] * self.samples[n].y.numel() for n in readers)
                self._choose(self.activations[site], evaluate, round_, cost, per_channel=by_head[site])
            if all(self.parameters.activations[s] is b for s, b in zip(free, before, strict=True)):
                break

    def _product_errors(self, name: str, inputs: list[str | None], site: str) -> Evaluate:
        """Error of a product as a share of its energy, by candidates of one site, the other operand coded as it is."""
        sample: ProductSample = self.samples[name]
        operands = "".join(o for o, s in zip("ab", inputs, strict=True) if s == site)
        other, other_site = (sample.b, inputs[1]) if operands == "a" else (sample.a, inputs[0])
        if other_site is not None and operands != "ab":
            quantizer = self.parameters.uniform(other_site)
            if quantizer.axis is None or self._is_by_head(name, other_site):
                other = Candidates.of(quantizer)(other, sample.head[:, None, None])[0]
        energy = product_error(sample, torch.zeros_like(sample.a), sample.b).clamp_min(torch.finfo().tiny)

        def evaluate(candidates: Candidates) -> Tensor:
            return product_errors(sample, operands, other, candidates) / energy

        return evaluate

    def _is_by_head(self, name: str, site: str) -> bool:
        """Whether the channel axis of a product's operand holds its heads."""
        direct = any(node.name == site for node in self.nodes[name].all_input_nodes)
        return direct and len(self.activations[site].shape) == 4

    def _value(self, name: str, sample: ValueSample) -> None:
        """A value that no layer reads: its error is measured behind the activation function that reads it, if any."""
        through = only_activation(self.nodes[name])

        def seen(x: Tensor) -> Tensor:
            return x if through is None else through(x)

        if self.parameters.uniform(name).axis is not None:
            return  # single numbers do not tell their channel: what the recipe asked for stays
        target = seen(sample.x)
        weight = sample.importance if through is not None else sample.weight  # gradients are those of the value itself

        def evaluate(candidates: Candidates) -> Tensor:
            def errors(c: Candidates) -> Tensor:
                return (seen(c(sample.x)) - target).square_().mul_(weight).sum(1, keepdim=True)

            return in_chunks(sample.x.numel(), errors, candidates)

        self._choose(self.activations[name], evaluate, 0, 16 * sample.x.numel(), per_channel=False)

    def _choose(
        self,
        site: ActivationSite,
        evaluate: Evaluate,
        round_: int,
        cost: int,
        *,
        separable: bool = False,
        per_channel: bool = True,
    ) -> None:
        statistics = self.problem.statistics[site.value]
        extremes = Range(statistics.low, statistics.high)
        if per_channel and statistics.channel_low is not None:
            extremes = replace(
                extremes,
                channel_low=statistics.channel_low,
                channel_high=statistics.channel_high,
                axis=site.channel_axis,
            )
        incumbent = self.parameters.uniform(site.value)
        start = Choice(incumbent, float(evaluate(Candidates.of(incumbent)).sum()))
        space = self.spaces.activation(site)
        chosen = search(space, extremes, evaluate, start, separable=separable, cost=cost, again=round_ > 0)
        self.parameters.activations[site.value] = chosen.quantizer


def _linked(products: list[str], sites: dict[str, set[str]]) -> list[list[str]]:
    """Products in groups that share no site, in their order; those without a site of their own are left out."""
    groups: list[tuple[list[str], set[str]]] = []
    for name in products:
        if not sites[name]:
            continue
        met = [g for g in groups if g[1] & sites[name]]
        names, shared = [n for g in met for n in g[0]], set().union(*(g[1] for g in met))
        groups = [g for g in groups if g not in met]
        groups.append(([*names, name], shared | sites[name]))
    return [names for names, _ in groups]
