"""Softmax and norms in integers, as FQ-ViT and HyQ have them: formats and operators for a net quantized throughout."""

from __future__ import annotations

import torch
from torch import fx

from qhyvit.graph.ops import MATMUL, WEIGHTED, argument, aten, constant, is_call, shape
from qhyvit.graph.patterns import norm_inputs, readers, softmax_outputs
from qhyvit.graph.sites import ActivationSite, source_site
from qhyvit.methods.base import Problem
from qhyvit.methods.formats import Formats, softmax_stand_in
from qhyvit.operators import IntegerLayerNorm, IntegerSoftmax
from qhyvit.operators.softmax import Exponential
from qhyvit.quantized import Parameters
from qhyvit.quantizers.log import Log2
from qhyvit.quantizers.power_of_two import PowerOfTwoFactor
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.rows import sample_rows

ROWS = 2048


def power_of_two_factors(problem: Problem, parameters: Parameters, formats: Formats, method: str, largest: int) -> None:
    """Give the inputs of norms a power-of-two factor per channel, where only norms and additions read them.

    Args:
        problem: the net.
        parameters: hold a quantizer for every site; changed, notes included.
        formats: asked for the format.
        method: for notes.
        largest: the largest exponent, K.
    """
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    found, refused = [], 0
    for site, norm in norm_inputs(problem.graph, problem.sites):
        if any(is_call(r, WEIGHTED | MATMUL) for r in readers(nodes, site)) or _channels(norm) != _size(site):
            refused += 1
        elif formats.has(PowerOfTwoFactor.kind, "inputs of norms have one scale per tensor"):
            found.append(site)
    rows = sample_rows(problem, {s.value: s.channel_axis for s in found}, ROWS)
    for site in found:
        statistics = problem.statistics[site.value]
        bits = problem.bits(site).activation_bits
        parameters.activations[site.value] = PowerOfTwoFactor.fitted(
            rows[site.value], statistics.low, statistics.high, bits=bits, axis=site.channel_axis, largest=largest
        )
    if refused:
        parameters.notes.append(
            f"{method}: {refused} inputs of norms are read by layers too, which need one scale: no power-of-two factors"
        )
    elif not norm_inputs(problem.graph, problem.sites):
        parameters.notes.append(
            f"{method}: no norm's input is quantized in scope {problem.recipe.scope}: no power-of-two factors"
        )


def integer_norms(problem: Problem, parameters: Parameters) -> None:
    """Compute in integers the LayerNorms whose input has power-of-two factors and whose output one scale."""
    for node in problem.graph.graph.nodes:
        if not is_call(node, aten.layer_norm.default) or len(argument(node, "normalized_shape")) != 1:
            continue
        source = source_site(problem.sites, node, 0)
        before = parameters.activations.get(source or "")
        after = parameters.activations.get(node.name)
        if not isinstance(before, PowerOfTwoFactor) or not isinstance(after, UniformAffine) or after.axis is not None:
            continue
        weight, bias = (constant(problem.graph, argument(node, name)) for name in ("weight", "bias"))
        ones = torch.ones(_channels(node))
        weight = ones if weight is None else weight
        bias = torch.zeros_like(ones) if bias is None else bias
        eps = float(argument(node, "eps"))
        parameters.operators[node.name] = IntegerLayerNorm(before.base_scale, weight, bias, after.scale, eps=eps)


def integer_softmax(
    problem: Problem,
    parameters: Parameters,
    formats: Formats,
    method: str,
    exponential: Exponential,
    bits: int | None,
) -> None:
    """Softmax outputs as powers of two, computed in integers where the scores are codes with one scale.

    Args:
        problem: the net.
        parameters: hold a quantizer for every site; changed, notes included.
        formats: asked for the format.
        method: for notes.
        exponential: see `IntegerSoftmax`.
        bits: width of the output; None: that of the site.
    """
    outputs = softmax_outputs(problem.graph, problem.sites)
    in_float = 0
    for site, node in outputs:
        if not formats.has_for_softmax(Log2.kind, site, bits):
            parameters.activations[site.value] = softmax_stand_in(problem, site)
            continue
        width = bits or problem.bits(site).activation_bits
        parameters.activations[site.value] = Log2(torch.ones(()), bits=width)
        scores = parameters.activations.get(source_site(problem.sites, node, 0) or "")
        if not isinstance(scores, UniformAffine) or scores.axis is not None:
            in_float += 1
        elif formats.has(IntegerSoftmax.kind, "softmaxes are computed in float"):
            axis = argument(node, "dim") % len(shape(node))
            parameters.operators[node.name] = IntegerSoftmax(
                scores.scale, bits=width, axis=axis, exponential=exponential
            )
    if in_float:
        parameters.notes.append(
            f"{method}: the scores of {in_float} softmaxes are not codes in scope {problem.recipe.scope}: log2 codes "
            "of the float softmax"
        )
    if not outputs:
        parameters.notes.append(f"{method}: no quantized softmax feeds a product: no log-int-softmax")


def _channels(norm: fx.Node) -> int:
    if norm.target == aten.layer_norm.default:
        return int(argument(norm, "normalized_shape")[-1])
    return shape(norm)[1]


def _size(site: ActivationSite) -> int:
    return site.shape[site.channel_axis]
