"""PTQ4ViT (Yuan, Xue, Chen, Wu, Sun, arXiv 2111.12293): twin uniform quantization and Hessian-guided steps."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qhyvit.calibration.gradients import Source
from qhyvit.calibration.samples import ProductSample
from qhyvit.graph.ops import CONVOLUTIONS, is_call
from qhyvit.graph.patterns import MINIMA, activation_outputs, fused_parts, softmax_outputs
from qhyvit.graph.sites import ActivationSite, WeightSite
from qhyvit.methods.base import Problem
from qhyvit.methods.formats import Formats, softmax_stand_in
from qhyvit.methods.options import read_options
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import Parameters
from qhyvit.quantizers.base import Quantizer
from qhyvit.quantizers.twin import TwinUniform, twin_for_activation, twin_for_probabilities
from qhyvit.quantizers.uniform import UniformAffine, uniform_from_range
from qhyvit.search.errors import product_error
from qhyvit.search.gather import gather
from qhyvit.search.scales import best_activation_step, best_weight_step
from qhyvit.search.walk import ActivationError, Walk, WeightErrors

SPLITS = tuple(2.0**-m for m in range(20))


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        gradient: where g comes from: "default_quant", "fisher", or "none" (plain squared error).
        candidates: factors 0.01 + i·0.0119·(100 / candidates), i = 0...
        rounds: alternations of weights and activations, at most.
        positions: sampled per layer.
        twin: whether softmax and activation outputs are twin uniform.
    """

    gradient: Source = "default_quant"
    candidates: Annotated[int, Field(ge=2)] = 100
    rounds: Annotated[int, Field(ge=1)] = 3
    positions: Annotated[int, Field(ge=16)] = 512
    twin: bool = True


def factors(count: int = 100) -> Tensor:
    """0.01 + i·0.0119 for i = 0..99, ending at 1.1881; with another count as many steps of the same reach."""
    return 0.01 + torch.arange(count) * (0.0119 * 99 / (count - 1))


def ptq4vit(problem: Problem) -> Parameters:
    """PTQ4ViT: twin uniform softmax and activation outputs; steps by the Hessian-weighted error of each layer.

    Yuan et al., ECCV 2022, arXiv 2111.12293. Symmetric; weights of linears one step per tensor (a fused projection: one
    for each of query, key and value), of convolutions one per output channel, activations one per tensor. Candidates
    0.01 + i·0.0119, i = 0..99, on the min-max step; 3 rounds, weights then input (products: left, then right);
    objective Σ (g·(O - Ô))² on 512 sampled positions, inputs float. Softmax: twin uniform, split 2^0..2^-19, found
    beside a float other operand. GELU outputs (here also SiLU and hard-swish): twin uniform, the negative step fixed by
    the function's minimum, the positive one searched.

    Other than the released code: g is taken from the network quantized by default, not from the float one, where it is
    rounding noise; a number is quantized by one of the twins, not by the sum of both; inputs of convolutions are
    quantized; products have one step per tensor (there one per head).

    Options (defaults): gradient default_quant, candidates 100, rounds 3, positions 512, twin true.
    """
    options = read_options(Options, "ptq4vit", problem.recipe.options)
    formats = Formats(problem, "ptq4vit")
    parameters = set_ranges(problem, "mse")
    softmaxes = [s for s, _ in softmax_outputs(problem.graph, problem.sites)]
    activations = activation_outputs(problem.graph, problem.sites)
    chooser = _Hessian(problem, options)
    if options.twin:
        chooser.probabilities = {s.value for s in softmaxes if formats.has_for_softmax(TwinUniform.kind, s)}
        for site in softmaxes:
            if site.value not in chooser.probabilities:
                chooser.fixed.add(site.value)
                parameters.activations[site.value] = softmax_stand_in(problem, site)
        stand_in = "outputs of activation functions are asymmetric uniform of the same width"
        chooser.minima = {site.value: MINIMA[node.target] for site, node in activations}
        chooser.twins = {
            site.value
            for site, _ in activations
            if formats.has(TwinUniform.kind, stand_in, problem.bits(site).activation_bits)
        }
        parameters.notes += [
            f"ptq4vit: no quantized {w}: no twin uniform there" for w in _missing(softmaxes, activations)
        ]
    samples = gather(problem, options.gradient, options.positions)
    walk = Walk(problem, parameters, samples, chooser)
    walk.run(options.rounds)
    rest = len(parameters.activations) - len(walk.searched)
    if rest:
        parameters.notes.append(f"ptq4vit: {rest} values that no layer or product reads have the range of method mse")
    parameters.notes += formats.notes()
    return parameters


def _missing(softmaxes: Sized, activations: Sized) -> list[str]:
    found = {"softmax feeds a product": softmaxes, "GELU, SiLU or hard-swish feeds a layer": activations}
    return [what for what, where in found.items() if not len(where)]


class _Hessian:
    """Steps of least weighted squared error."""

    def __init__(self, problem: Problem, options: Options) -> None:
        self._problem = problem
        self._factors = factors(options.candidates)
        self._nodes = {n.name: n for n in problem.graph.graph.nodes}
        self.probabilities: set[str] = set()  # twin uniform softmax outputs
        self.fixed: set[str] = set()
        self.minima: dict[str, float] = {}  # of functions with a small negative side
        self.twins: set[str] = set()  # those of them that are twin uniform

    def weight(self, site: WeightSite, weight: Tensor, current: UniformAffine, errors: WeightErrors) -> UniformAffine:
        found = best_weight_step(
            weight, self._groups(site, len(weight)), self._factors, self._problem.bits(site).weight_bits, errors
        )
        return current if torch.equal(found.scale, current.scale) else found

    def _groups(self, site: WeightSite, count: int) -> Tensor:
        node = self._nodes[site.node]
        if is_call(node, CONVOLUTIONS):
            return torch.arange(count)
        groups = torch.zeros(count, dtype=torch.int64)
        for number, part in enumerate(fused_parts(node)):
            groups[part] = number
        return groups

    def activation(self, site: ActivationSite, current: Quantizer, error: ActivationError) -> Quantizer:
        bits = self._problem.bits(site).activation_bits
        statistics = self._problem.statistics[site.value]
        if site.value in self.fixed:
            return current
        if site.value in self.probabilities:
            return _best((twin_for_probabilities(split, bits=bits) for split in SPLITS), current, error)
        if site.value in self.minima:
            top, lowest = statistics.high.float().clamp_min(1e-6), self.minima[site.value]
            if site.value in self.twins:
                step = top / ((1 << (bits - 1)) - 0.5)
                return _best((twin_for_activation(step * f, lowest, bits=bits) for f in self._factors), current, error)
            bottom = statistics.low.float().clamp(min=lowest)
            return _best((_asymmetric(bottom, top * f, bits) for f in self._factors), current, error)
        reach = torch.maximum(statistics.low.abs(), statistics.high.abs()).float()
        found = best_activation_step(reach, self._factors, bits, error)
        return current if isinstance(current, UniformAffine) and torch.equal(found.scale, current.scale) else found

    def product_error(self, sample: ProductSample, a: Tensor, b: Tensor) -> Tensor:
        return product_error(sample, a, b)

    def beside_float(self, site: ActivationSite) -> bool:
        return site.value in self.probabilities


def _asymmetric(low: Tensor, high: Tensor, bits: int) -> UniformAffine:
    return uniform_from_range(low, high, bits=bits, scheme="asymmetric", signed=False)


def _best(candidates: Iterable[Quantizer], current: Quantizer, error: ActivationError) -> Quantizer:
    """The candidate of least error; `current` where that is the same quantizer."""
    tried = list(candidates)
    found = tried[int(torch.stack([error(q) for q in tried]).argmin())]
    same = type(current) is type(found) and all(
        torch.equal(value, found.state_dict()[key]) for key, value in current.state_dict().items()
    )
    return current if same else found
