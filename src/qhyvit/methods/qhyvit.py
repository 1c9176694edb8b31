"""Q-HyViT (Lee, Kwon et al., arXiv 2303.12557): scale, granularity and scheme by Hessian-weighted reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx

from qhyvit.calibration.gradients import Source
from qhyvit.calibration.samples import LayerSample, ProductSample, ValueSample
from qhyvit.errors import RecipeError
from qhyvit.graph.ops import ACTIVATIONS, CONVOLUTIONS, WEIGHTED, is_call, weight_of
from qhyvit.graph.sites import ActivationSite, WeightSite, source_site
from qhyvit.methods.base import Problem
from qhyvit.methods.ranges import set_ranges
from qhyvit.progress import task
from qhyvit.quantized import Parameters
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.balancing import balance_all
from qhyvit.search.gather import gather
from qhyvit.search.operands import Choice, LayerError, Range, Space, product_error, search
from qhyvit.targets import TARGETS


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        gradient: where g comes from: "default_quant" (the paper's), "fisher", or "none" (plain squared error, the
            default: on the nets measured so far the weights cost SQNR, see docs/methods.md).
        granularity, scheme: whether to search them; otherwise the recipe's are kept.
        rounds: alternations of weights and activations.
        positions: sampled per layer.
        coarse: try every so many of the 100 candidates first; 1 is brute force.
        one_sided: also shrink each end of an activation range alone (not in the paper).
        balance: shift and scale channels exactly where that lowers the error (per-channel granularity in a form that
            every target executes; not in the paper).
        start: range setting of the incumbent that the search has to beat.
    """

    gradient: Source = "none"
    granularity: bool = True
    scheme: bool = True
    rounds: int = 3
    positions: int = 1024
    coarse: int = 4
    one_sided: bool = True
    balance: bool = True
    start: Literal["minmax", "percentile", "mse", "kl"] = "mse"


def read_options(given: dict[str, Any]) -> Options:
    """Options from a recipe.

    Raises:
        RecipeError: on an unknown key or a value of the wrong kind.
    """
    unknown = sorted(set(given) - set(Options.__dataclass_fields__))
    if unknown:
        known = ", ".join(Options.__dataclass_fields__)
        raise RecipeError(f"recipe key 'options.{unknown[0]}' is not one of method qhyvit; allowed: {known}.")
    options = replace(Options(), **given)
    if options.gradient not in get_args(Source):
        raise RecipeError(
            f"recipe key 'options.gradient': {options.gradient!r}; allowed: {', '.join(get_args(Source))}."
        )
    return options


def qhyvit(problem: Problem) -> Parameters:
    """Scale, granularity and scheme of each operand by reconstruction error (Q-HyViT without bridge blocks yet)."""
    options = read_options(problem.recipe.options)
    problem.per_channel = True
    parameters = set_ranges(problem, options.start)
    samples = gather(problem, options.gradient, options.positions)
    if options.balance:
        changed = balance_all(problem, samples, _layer_errors(problem, samples))
        if changed:
            parameters = set_ranges(problem, options.start)
            samples = gather(problem, options.gradient, options.positions)
        parameters.notes.append(f"qhyvit: {len(changed)} values shifted or scaled by channel")
    search_all = _Search(problem, options, parameters, samples)
    with task("Searching", len(search_all.units)) as advance:
        for unit in search_all.units:
            unit()
            advance(1)
    return parameters


def _layer_errors(problem: Problem, samples: dict[str, Any]) -> dict[str, LayerError]:
    """The weighted error of every sampled layer."""
    found = {}
    for node in problem.graph.graph.nodes:
        sample = samples.get(node.name)
        if not isinstance(sample, LayerSample):
            continue
        weight, bias = weight_of(problem.graph, node)  # type: ignore[misc]
        groups, k = sample.x.shape[1:]
        taps = weight[0, 0].numel() if is_call(node, CONVOLUTIONS) else 1
        channel_of = torch.arange(groups * k).div(taps, rounding_mode="floor").view(groups, k)
        found[node.name] = LayerError(sample, weight, bias, channel_of)
    return found


class _Search:
    """The search over all sites of one problem; `units` are independent of each other."""

    def __init__(self, problem: Problem, options: Options, parameters: Parameters, samples: dict[str, Any]) -> None:
        self.problem, self.options, self.parameters, self.samples = problem, options, parameters, samples
        self.nodes = {n.name: n for n in problem.graph.graph.nodes}
        self.weights = {s.node: s for s in problem.sites.weights}
        self.activations = {s.value: s for s in problem.sites.activations}
        self.target = TARGETS[problem.recipe.target]
        inputs = {name: self._sites_of(self.nodes[name]) for name in samples if name in self.nodes}
        layers: dict[str | None, list[str]] = {}
        for name in self.weights:
            if isinstance(samples.get(name), LayerSample):
                layers.setdefault(inputs[name][0], []).append(name)
        self.units: list[Callable[[], None]] = [partial(self._layers, s, names) for s, names in layers.items()]
        done = {s for s in layers if s is not None}
        for name, sample in samples.items():
            if isinstance(sample, ProductSample):
                self.units.append(partial(self._product, sample, inputs[name], frozenset(done)))
                done |= {i for i in inputs[name] if i is not None}
        for key, sample in samples.items():
            name = key.removeprefix("value:")
            if isinstance(sample, ValueSample) and name not in done:
                self.units.append(partial(self._value, name, sample))

    def _sites_of(self, node: fx.Node) -> list[str | None]:
        count = 1 if is_call(node, WEIGHTED) else 2
        return [source_site(self.problem.sites, node, i) for i in range(count)]

    # One input with all layers that read it -----------------------------------------------------------------------

    def _layers(self, source: str | None, names: list[str]) -> None:
        errors = _layer_errors(self.problem, {n: self.samples[n] for n in names})
        floats = {n: self._float_weight(n) for n in names}
        for _ in range(self.options.rounds):
            before = [self.parameters.activations.get(source or ""), *(self.parameters.weights[n] for n in names)]
            for name in names:
                self._weight(name, errors[name], floats[name], source)
            if source is not None:
                self._activation(source, names, errors)
            after = [self.parameters.activations.get(source or ""), *(self.parameters.weights[n] for n in names)]
            if all(a is b for a, b in zip(before, after, strict=True)):
                break

    def _float_weight(self, name: str) -> Tensor:
        found = weight_of(self.problem.graph, self.nodes[name])
        assert found is not None
        return found[0]

    def _weight(self, name: str, error: LayerError, weight: Tensor, source: str | None) -> None:
        x = error.quantized_input(self.parameters.uniform(source) if source is not None else None)

        def evaluate(quantizer: UniformAffine) -> Tensor:
            return error(x, error.grouped(quantizer(weight)))

        rows = weight.flatten(1)
        extremes = Range(weight.min(), weight.max(), rows.amin(1), rows.amax(1), 0)
        incumbent = self.parameters.weights[name]
        start = Choice(incumbent, float(evaluate(incumbent).sum()))
        space = self._weight_space(self.weights[name])
        self.parameters.weights[name] = search(space, extremes, evaluate, start, separable=True).quantizer

    def _activation(self, source: str, names: list[str], errors: dict[str, LayerError]) -> None:
        weights = {n: errors[n].grouped(self.parameters.weights[n](self._float_weight(n))) for n in names}
        site = self.activations[source]
        depthwise = len(names) == 1 and self.weights[names[0]].depthwise

        def evaluate(quantizer: UniformAffine) -> Tensor:
            found = [errors[n](errors[n].quantized_input(quantizer), weights[n]) for n in names]
            return found[0] if depthwise else torch.stack([f.sum() for f in found])

        self._choose_activation(site, evaluate, separable=depthwise)

    # Products of activations and single values -------------------------------------------------------------------

    def _product(self, sample: ProductSample, inputs: list[str | None], done: frozenset[str]) -> None:
        left, right = inputs

        def current(site: str | None, values: Tensor) -> Tensor:
            return values if site is None else self.parameters.activations[site](values)

        for _ in range(self.options.rounds):
            before = [self.parameters.activations.get(s or "") for s in inputs]
            if left is not None and left not in done:
                b = current(right, sample.b)
                self._choose_activation(
                    self.activations[left], lambda q, b=b: product_error(sample, q(sample.a), b), per_tensor=True
                )
            if right is not None and right not in done:
                a = current(left, sample.a)
                self._choose_activation(
                    self.activations[right], lambda q, a=a: product_error(sample, a, q(sample.b)), per_tensor=True
                )
            if all(self.parameters.activations.get(s or "") is b for s, b in zip(inputs, before, strict=True)):
                break

    def _value(self, name: str, sample: ValueSample) -> None:
        """A value that no layer reads: its error is measured behind the activation function that reads it, if any."""
        readers = [self.nodes[r] for r in self.activations[name].readers]
        through = readers[0] if len(readers) == 1 and readers[0].target in ACTIVATIONS else None

        def seen(x: Tensor) -> Tensor:
            return x if through is None else through.target(x, *through.args[1:], **through.kwargs)  # type: ignore[operator]

        target = seen(sample.x)
        weight = torch.ones_like(sample.weight) if through is not None else sample.weight
        self._choose_activation(
            self.activations[name],
            lambda q: (seen(q(sample.x)) - target).square_().mul_(weight).sum(),
            per_tensor=True,
        )

    def _choose_activation(
        self, site: ActivationSite, evaluate: Any, *, separable: bool = False, per_tensor: bool = False
    ) -> None:
        statistics = self.problem.statistics[site.value]
        extremes = Range(statistics.low, statistics.high)
        if not per_tensor and statistics.channel_low is not None:
            extremes = replace(
                extremes,
                channel_low=statistics.channel_low,
                channel_high=statistics.channel_high,
                axis=site.channel_axis,
            )
        incumbent = self.parameters.uniform(site.value)
        start = Choice(incumbent, float(evaluate(incumbent).sum()))
        space = self._activation_space(site)
        chosen = search(space, extremes, evaluate, start, separable=separable)
        self.parameters.activations[site.value] = chosen.quantizer

    def _weight_space(self, site: WeightSite) -> Space:
        asked = self.problem.bits(site)
        schemes: Any = (asked.weights.scheme,)
        if self.options.scheme and self.target.asymmetric_weights:
            schemes = ("symmetric", "asymmetric")
        grains: Any = ("per-tensor", "per-channel") if self.options.granularity else (asked.weights.granularity,)
        return Space(asked.weight_bits, True, schemes, grains, coarse=self.options.coarse)

    def _activation_space(self, site: ActivationSite) -> Space:
        asked = self.problem.bits(site)
        schemes: Any = ("symmetric", "asymmetric") if self.options.scheme else (asked.activations.scheme,)
        grains: Any = (asked.activations.granularity,)
        if self.options.granularity and self.target.per_channel_activations:
            grains = ("per-tensor", "per-channel")
        return Space(
            asked.activation_bits, False, schemes, grains, one_sided=self.options.one_sided, coarse=self.options.coarse
        )
