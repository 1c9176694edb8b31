"""Whether a scale per channel is worth having for an activation, judged on pictures that its ranges do not come from.

A channel's range is read from fewer numbers than the tensor's: of values before a pooled head, one a picture. On the
pictures that gave the ranges such scales look good, whatever they do to others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qhyvit.calibration.samples import LayerSample
from qhyvit.graph.channels import consumers
from qhyvit.methods.base import Problem
from qhyvit.search.balancing import least_error
from qhyvit.search.errors import InputError, LayerError

GAIN = 0.8  # the share to which the error of the layers behind must fall


def not_worth_channels(problem: Problem, samples: dict[str, Any], errors: dict[str, LayerError]) -> set[str]:
    """Values for which one scale does about as well as one for each channel.

    Args:
        problem: sites, and statistics of the pictures that ranges may come from.
        samples: of other pictures, by layer name.
        errors: of these samples, by layer name.

    Returns:
        Names of values. Those that other operators than sampled layers read are not judged, and not among them.
    """
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    found = set()
    for site in problem.sites.activations:
        statistics = problem.statistics[site.value]
        layers = consumers(problem.graph, nodes[site.value], site.channel_axis, site.readers)
        if not layers or statistics.channel_low is None or statistics.channel_high is None:
            continue
        if not all(isinstance(samples.get(node.name), LayerSample) for node, _ in layers):
            continue
        bits = problem.bits(site).activation_bits
        one, each = 0.0, 0.0
        for node, index in layers:
            error = errors[node.name]
            one += _error(error, statistics.low, statistics.high, bits)
            each += _error(error, statistics.channel_low[index], statistics.channel_high[index], bits)
        if not each < GAIN * one:
            found.add(site.value)
    return found


def _error(layer: LayerError, low: Tensor, high: Tensor, bits: int) -> float:
    """Error of a layer with the best of a few ranges of its input, or of each input channel (C_in,)."""
    return least_error([InputError(layer, layer.weight)], low, high, bits)
