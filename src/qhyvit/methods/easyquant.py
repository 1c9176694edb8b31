"""EasyQuant (Wu et al., arXiv 2006.16669): symmetric steps by the cosine of the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qhyvit.calibration.samples import ProductSample
from qhyvit.graph.sites import ActivationSite, WeightSite
from qhyvit.methods.base import Problem, with_settings
from qhyvit.methods.options import read_options
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import Parameters
from qhyvit.quantizers.base import Quantizer
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.cosine import CosineError, product_distance
from qhyvit.search.gather import gather
from qhyvit.search.scales import best_activation_step, best_weight_step
from qhyvit.search.walk import ActivationError, Walk, WeightErrors


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        alpha, beta: the smallest and the largest factor on the step of the largest magnitude.
        candidates: how many factors.
        rounds: alternations of weights and activations, at most.
        positions: sampled per layer.
    """

    alpha: Annotated[float, Field(gt=0)] = 0.5
    beta: Annotated[float, Field(gt=0)] = 2.0
    candidates: Annotated[int, Field(ge=1)] = 100
    rounds: Annotated[int, Field(ge=1)] = 3
    positions: Annotated[int, Field(ge=16)] = 512


def easyquant(problem: Problem) -> Parameters:
    """EasyQuant: symmetric steps that maximise the cosine similarity of each layer's output.

    Wu et al., arXiv 2006.16669, in the paper's form: 100 factors from 0.5 to 2 on the min-max step, weights per output
    channel (each channel by its own outputs) and activations per tensor, in turn until nothing changes, at most 3
    rounds. Layers are fitted on float inputs, the cosine is that of 512 sampled positions; products of activations by
    the mean cosine of their heads. Values that no layer or product reads keep their symmetric min-max step.

    Vision-transformer papers mean beta 1.2, rounds 1 by "EasyQuant" or "BasePTQ".

    Options (defaults): alpha 0.5, beta 2.0, candidates 100, rounds 3, positions 512.
    """
    options = read_options(Options, "easyquant", problem.recipe.options)
    settings = with_settings(
        problem,
        weights={"granularity": "per-channel", "scheme": "symmetric"},
        activations={"granularity": "per-tensor", "scheme": "symmetric"},
    )
    parameters = set_ranges(settings, "minmax")
    samples = gather(problem, "none", options.positions)
    walk = Walk(problem, parameters, samples, _Cosine(settings, options), CosineError)
    walk.run(options.rounds)
    rest = len(parameters.activations) - len(walk.searched)
    if rest:
        parameters.notes.append(f"easyquant: {rest} values that no layer or product reads keep their min-max step")
    return parameters


class _Cosine:
    def __init__(self, problem: Problem, options: Options) -> None:
        self._problem = problem
        self._factors = torch.linspace(options.alpha, options.beta, options.candidates)

    def weight(self, site: WeightSite, weight: Tensor, current: UniformAffine, errors: WeightErrors) -> UniformAffine:
        bits = self._problem.bits(site).weight_bits
        found = best_weight_step(weight, torch.arange(len(weight)), self._factors, bits, errors)
        return current if torch.equal(found.scale, current.scale) else found

    def activation(self, site: ActivationSite, current: Quantizer, error: ActivationError) -> Quantizer:
        statistics = self._problem.statistics[site.value]
        reach = torch.maximum(statistics.low.abs(), statistics.high.abs()).float()
        found = best_activation_step(reach, self._factors, self._problem.bits(site).activation_bits, error)
        return current if isinstance(current, UniformAffine) and torch.equal(found.scale, current.scale) else found

    def product_error(self, sample: ProductSample, a: Tensor, b: Tensor) -> Tensor:
        return product_distance(sample, a, b)

    def beside_float(self, site: ActivationSite) -> bool:
        return False
