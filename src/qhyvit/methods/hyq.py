"""HyQ (IJCAI 2024): distribution scaling of 1×1 convolutions, linear integer softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx

from qhyvit.calibration.samples import LayerSample
from qhyvit.graph.balance import balance, foldable
from qhyvit.graph.channels import consumers
from qhyvit.graph.ops import aten, is_call, shape, weight_of
from qhyvit.graph.patterns import MINIMA, source
from qhyvit.graph.sites import ActivationSite
from qhyvit.methods.base import Problem, with_settings
from qhyvit.methods.formats import Formats
from qhyvit.methods.integer_parts import integer_norms, integer_softmax, power_of_two_factors
from qhyvit.methods.options import read_options
from qhyvit.methods.ranges import set_ranges
from qhyvit.progress import task
from qhyvit.quantized import Parameters
from qhyvit.quantizers.uniform import uniform_from_range
from qhyvit.search.distribution import distribution_scaling
from qhyvit.search.gather import gather


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        steps: of Adam for the factors of one value; 0: no distribution scaling.
        rate: its first learning rate.
        positions: sampled per layer.
        multiply: also scale where the factors do not fold into a producer and stay as a multiplication at run time.
        factors: the largest exponent of the power-of-two factors of norm inputs; 0: none.
        softmax_bits: width of softmax outputs.
        integer_norms: whether LayerNorms with power-of-two factors are computed in integers.
    """

    steps: Annotated[int, Field(ge=0)] = 1000
    rate: Annotated[float, Field(gt=0)] = 0.01
    positions: Annotated[int, Field(ge=16)] = 512
    multiply: bool = True
    factors: Annotated[int, Field(ge=0, le=7)] = 3
    softmax_bits: Annotated[int, Field(ge=2, le=8)] = 4
    integer_norms: bool = True


def hyq(problem: Problem) -> Parameters:
    """HyQ: learned channel factors before 1×1 convolutions, scales per channel before depthwise ones, integer softmax.

    "HyQ: Hardware-Friendly Post-Training Quantization for CNN-Transformer Hybrid Networks", IJCAI 2024. Weights
    symmetric per output channel, activations asymmetric per tensor, min-max. Inputs of 1×1 convolutions: x / α, W·α
    with α per channel by 1,000 steps of Adam (rate 0.01, cosine) on the squared error of the output, the best α kept.
    Inputs of depthwise convolutions: a scale per channel, the lower end that of the activation function. In
    scope full: power-of-two factors and integer LayerNorm as in FQ-ViT, integer softmax with a linear exponential and
    4-bit log2 outputs.

    Other than the released code: roundings are straight-through; α = exp(a) stays positive; it is folded into a
    producer without activation function, and only remains a multiplication where that is impossible; the classifier,
    additions and activation functions are quantized as the recipe says.

    Options (defaults): steps 1000, rate 0.01, positions 512, multiply true, factors 3, softmax_bits 4,
    integer_norms true.
    """
    options = read_options(Options, "hyq", problem.recipe.options)
    formats = Formats(problem, "hyq")
    problem.per_channel = True
    notes = _scale_distributions(problem, options)
    settings = with_settings(
        problem,
        weights={"granularity": "per-channel", "scheme": "symmetric"},
        activations={"granularity": "per-tensor", "scheme": "asymmetric"},
    )
    parameters = set_ranges(settings, "minmax")
    parameters.notes += notes
    _depthwise_inputs(settings, parameters, formats)
    if options.factors:
        power_of_two_factors(settings, parameters, formats, "hyq", options.factors)
    if options.integer_norms:
        integer_norms(settings, parameters)
    integer_softmax(settings, parameters, formats, "hyq", "linear", options.softmax_bits)
    parameters.notes += formats.notes()
    return parameters


@dataclass(frozen=True)
class _Scaling:
    """A value that 1×1 convolutions read.

    Attributes:
        site: where it is quantized.
        readers: those of its readers that lead to these convolutions.
        layers: the convolutions, with the channel behind each input channel.
        folds: whether factors disappear into the producer.
    """

    site: ActivationSite
    readers: tuple[str, ...]
    layers: list[tuple[fx.Node, Tensor]]
    folds: bool


def _scale_distributions(problem: Problem, options: Options) -> list[str]:
    """Find the factors of all values on the float network, then write them into the graph."""
    if not options.steps:
        return []
    found = [s for s in _scalings(problem) if s.folds or options.multiply]
    if not found:
        return ["hyq: no quantized value feeds only 1×1 convolutions: no distribution was scaled"]
    samples = gather(problem, "none", options.positions)
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    chosen: list[tuple[_Scaling, Tensor]] = []
    with task("Scaling distributions", len(found)) as advance:
        for scaling in found:
            statistics = problem.statistics[scaling.site.value]
            layers = [(_inputs(samples[n.name]), _matrix(problem, n)) for n, _ in scaling.layers]
            assert statistics.channel_low is not None
            assert statistics.channel_high is not None
            alpha, loss, plain = distribution_scaling(
                layers,
                statistics.channel_low.float().clone(),
                statistics.channel_high.float().clone(),
                problem.recipe.for_layer(scaling.layers[0][0].meta["module"]).weight_bits,
                problem.bits(scaling.site).activation_bits,
                steps=options.steps,
                rate=options.rate,
            )
            if loss < plain:
                chosen.append((scaling, alpha))
            advance(1)
    for scaling, alpha in chosen:
        node, axis = nodes[scaling.site.value], scaling.site.channel_axis
        balance(problem.graph, node, axis, scaling.readers, alpha, torch.zeros_like(alpha))
    if chosen:
        problem.refresh()
    kept = sum(not scaling.folds for scaling, _ in chosen)
    remark = f"hyq: {len(chosen)} values scaled by channel before 1×1 convolutions"
    return [remark + (f", {kept} of them by a multiplication that stays at run time" if kept else "")]


def _scalings(problem: Problem) -> list[_Scaling]:
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    sampled = {s.node for s in problem.sites.weights}
    found = []
    for site in problem.sites.activations:
        node = nodes[site.value]
        if len(site.shape) < 2 or site.channel_axis == 0:
            continue
        behind = {r: consumers(problem.graph, node, site.channel_axis, [r]) for r in site.readers}
        pointwise = {r: layers for r, layers in behind.items() if layers and all(_is_pointwise(n) for n, _ in layers)}
        layers = list({n: (n, index) for found_ in pointwise.values() for n, index in found_}.values())
        whole = torch.arange(site.shape[site.channel_axis])
        if layers and all(n.name in sampled and torch.equal(index, whole) for n, index in layers):
            folds = foldable(problem.graph, node, site.channel_axis, tuple(pointwise))
            found.append(_Scaling(site, tuple(pointwise), layers, folds))
    return found


def _is_pointwise(node: fx.Node) -> bool:
    weight = node.args[1]
    if not is_call(node, aten.conv2d.default) or not isinstance(weight, fx.Node):
        return False
    _, channels, *kernel = shape(weight)
    return kernel == [1, 1] and channels == shape(node.args[0])[1]  # type: ignore[arg-type]


def _inputs(sample: LayerSample) -> Tensor:
    return sample.x.flatten(1)


def _matrix(problem: Problem, node: fx.Node) -> Tensor:
    found = weight_of(problem.graph, node)
    assert found is not None
    return found[0].flatten(1)


def _depthwise_inputs(problem: Problem, parameters: Parameters, formats: Formats) -> None:
    """A scale per channel for inputs of depthwise convolutions, from the activation function's minimum up."""
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    depthwise = {s.node for s in problem.sites.weights if s.depthwise}
    found = [s for s in problem.sites.activations if set(s.readers) <= depthwise]
    for site in found:
        statistics = problem.statistics[site.value]
        if not formats.has_channels("inputs of depthwise convolutions have one scale per tensor"):
            continue
        assert statistics.channel_low is not None
        assert statistics.channel_high is not None
        low, high = statistics.channel_low.float(), statistics.channel_high.float()
        minimum = MINIMA.get(source(nodes[site.value]).target)
        if minimum is not None:
            low = torch.full_like(low, minimum)
        parameters.activations[site.value] = uniform_from_range(
            low,
            high.maximum(low),
            bits=problem.bits(site).activation_bits,
            scheme="asymmetric",
            signed=False,
            axis=site.channel_axis,
        )
    if not found:
        parameters.notes.append("hyq: no quantized value feeds only depthwise convolutions: no scales per channel")
