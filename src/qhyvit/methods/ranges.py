"""Methods that only set ranges, site by site: minmax, percentile, mse, kl."""

from __future__ import annotations

from torch import Tensor

from qhyvit.calibration.ranges import RANGES, RangeOptions, weight_range
from qhyvit.calibration.statistics import TensorStatistics
from qhyvit.graph.ops import weight_of
from qhyvit.graph.sites import ActivationSite, WeightSite
from qhyvit.methods.base import Problem
from qhyvit.quantized import Parameters
from qhyvit.quantizers.uniform import UniformAffine, uniform_from_range


def set_ranges(problem: Problem, setting: str) -> Parameters:
    """Quantizers for all sites of a problem by one range setting (a name in `RANGES`)."""
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    parameters = Parameters()
    for weight_site in problem.sites.weights:
        found = weight_of(problem.graph, nodes[weight_site.node])
        assert found is not None
        parameters.weights[weight_site.node] = weight_quantizer(problem, weight_site, found[0], setting)
    for site in problem.sites.activations:
        parameters.activations[site.value] = activation_quantizer(
            problem, site, problem.statistics[site.value], setting
        )
    return parameters


def weight_quantizer(problem: Problem, site: WeightSite, weight: Tensor, setting: str) -> UniformAffine:
    """Quantizer of one weight (C_out, …) as the recipe asks."""
    asked = problem.bits(site)
    axis = 0 if asked.weights.granularity == "per-channel" else None
    options = RangeOptions(
        asked.weight_bits, asked.weights.scheme, problem.recipe.ranges.percentile, signed=True, narrow=False
    )
    low, high = weight_range(weight, setting, options, axis)
    return uniform_from_range(low, high, bits=asked.weight_bits, scheme=asked.weights.scheme, signed=True, axis=axis)


def activation_quantizer(
    problem: Problem, site: ActivationSite, statistics: TensorStatistics, setting: str
) -> UniformAffine:
    """Quantizer of one activation as the recipe asks; codes are unsigned, as x86 kernels want them."""
    asked = problem.bits(site)
    bits, scheme, zero = asked.activation_bits, asked.activations.scheme, problem.recipe.ranges.zero
    if asked.activations.granularity == "per-channel" and statistics.channel_low is not None:
        assert statistics.channel_high is not None
        return uniform_from_range(
            statistics.channel_low,
            statistics.channel_high,
            bits=bits,
            scheme=scheme,
            signed=False,
            axis=site.channel_axis,
            zero=zero,
        )
    options = RangeOptions(bits, scheme, problem.recipe.ranges.percentile, signed=False)
    low, high = RANGES[setting](statistics, options)
    return uniform_from_range(low, high, bits=bits, scheme=scheme, signed=False, zero=zero)


def minmax(problem: Problem) -> Parameters:
    """Min-max: the extremes of the calibration pictures. Fast, and at the mercy of one outlier."""
    return set_ranges(problem, "minmax")


def percentile(problem: Problem) -> Parameters:
    """Percentile: clips the rarest values. Recipe key `ranges.percentile`, default 99.99."""
    return set_ranges(problem, "percentile")


def mse(problem: Problem) -> Parameters:
    """Least squared quantization error of each tensor (OMSE, arXiv 1902.06822). The default."""
    return set_ranges(problem, "mse")


def kl(problem: Problem) -> Parameters:
    """Least Kullback-Leibler divergence of each activation's histogram (TensorRT's entropy calibration)."""
    return set_ranges(problem, "kl")
