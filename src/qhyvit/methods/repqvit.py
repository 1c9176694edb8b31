"""RepQ-ViT (Li, Xiao, Yang, Gu, arXiv 2212.08254): scale reparameterization of norm outputs, log √2 softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qhyvit.calibration.percentiles import PERCENTILES, percentile_search, row_percentile_search
from qhyvit.calibration.ranges import RangeOptions
from qhyvit.graph.balance import balance
from qhyvit.graph.ops import weight_of
from qhyvit.graph.patterns import Fold, folds, softmax_outputs
from qhyvit.graph.sites import ActivationSite
from qhyvit.methods.base import Problem
from qhyvit.methods.formats import Formats, softmax_stand_in
from qhyvit.methods.options import read_options
from qhyvit.quantized import Parameters
from qhyvit.quantizers.log import LogSqrt2
from qhyvit.quantizers.uniform import Scheme, UniformAffine, affine_parameters, uniform_from_range
from qhyvit.search.rows import sample_rows

ROWS = 4096  # positions sampled of each norm output
SOFTMAX_VALUES = 65536
RATIO_LIMIT = 64.0


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        percentiles: tried for every range, in percent; the one of least squared error is kept.
        fold: what is reparameterized: "norms", "layers" (also layers without activation in place of norms), "none".
    """

    percentiles: tuple[Annotated[float, Field(gt=50, le=100)], ...] = PERCENTILES
    fold: Literal["norms", "layers", "none"] = "norms"


def repqvit(problem: Problem) -> Parameters:
    """RepQ-ViT: per-channel ranges of norm outputs folded into norm and weights; log √2 softmax; percentile ranges.

    Li et al., ICCV 2023, arXiv 2212.08254. Weights asymmetric per channel, activations asymmetric per tensor, ranges
    from the best of the percentiles 99.9, 99.99, 99.999. Inputs of layers that follow a norm are first quantized per
    channel (s, z), then with s̃ = mean s, z̃ = round(mean z): x' = (x + s·(z - z̃)) / r, r = s / s̃, exactly, in the norm's
    affine and the next weights and biases. Softmax: log √2 codes, the scale from the same percentiles.

    Other than the released code: z̃ is an integer (there a fraction, which no integer runtime holds); norms are found in
    the graph, GroupNorm and 1×1 convolutions too; r is kept within 1/64..64 (dead channels); all ranges come from the
    float network; the first convolution's input has the recipe's width.

    Options (defaults): percentiles [99.9, 99.99, 99.999], fold norms.
    """
    options = read_options(Options, "repqvit", problem.recipe.options)
    formats = Formats(problem, "repqvit")
    parameters = Parameters()
    shared = {}
    if options.fold != "none":
        shared = fold_norms(problem, "repqvit", parameters.notes, options.percentiles, layers=options.fold == "layers")
    scheme = formats.weight_scheme("asymmetric")
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    for weight_site in problem.sites.weights:
        weight, _ = weight_of(problem.graph, nodes[weight_site.node])  # type: ignore[misc]
        bits = problem.bits(weight_site).weight_bits
        parameters.weights[weight_site.node] = per_row(weight, bits, scheme, options.percentiles)
    for site in problem.sites.activations:
        parameters.activations[site.value] = shared.get(site.value) or per_tensor(problem, site, options.percentiles)
    softmaxes = softmax_outputs(problem.graph, problem.sites)
    logarithmic = [site for site, _ in softmaxes if formats.has_for_softmax(LogSqrt2.kind, site)]
    values = sample_rows(problem, {s.value: s.channel_axis for s in logarithmic}, SOFTMAX_VALUES)
    for site, _ in softmaxes:
        parameters.activations[site.value] = (
            log_sqrt2_from_percentiles(
                values[site.value].flatten()[:SOFTMAX_VALUES], problem.bits(site).activation_bits, options.percentiles
            )
            if site in logarithmic
            else softmax_stand_in(problem, site)
        )
    if not softmaxes:
        parameters.notes.append("repqvit: no quantized softmax feeds a product: log √2 applies nowhere")
    parameters.notes += formats.notes()
    return parameters


def per_row(weight: Tensor, bits: int, scheme: Scheme, percentiles: tuple[float, ...]) -> UniformAffine:
    """Quantizer of a weight (C_out, …), each output channel with the percentile of its own least squared error."""
    ends = row_percentile_search(weight.flatten(1), RangeOptions(bits, scheme, signed=True), percentiles)
    return uniform_from_range(*ends, bits=bits, scheme=scheme, signed=True, axis=0)


def per_tensor(problem: Problem, site: ActivationSite, percentiles: tuple[float, ...] = PERCENTILES) -> UniformAffine:
    """Asymmetric quantizer of an activation, one scale, from the percentile of least squared error."""
    bits = problem.bits(site).activation_bits
    ends = percentile_search(problem.statistics[site.value], RangeOptions(bits, "asymmetric"), percentiles)
    return uniform_from_range(*ends, bits=bits, scheme="asymmetric", signed=False)


def fold_norms(
    problem: Problem,
    method: str,
    notes: list[str],
    percentiles: tuple[float, ...] = PERCENTILES,
    *,
    layers: bool = False,
) -> dict[str, UniformAffine]:
    """Reparameterize every value that can be: a norm makes it, only layers read it.

    Args:
        problem: its graph is changed, its float output is not; sites and statistics are found again.
        method: for notes.
        notes: a sentence is added.
        percentiles: tried for the range of each channel.
        layers: also values that a layer makes.

    Returns:
        By value, the quantizer with one scale that now serves all channels.
    """
    found = find_folds(problem, method, notes, layers=layers)
    shared = {}
    for fold, (low, high) in zip(found, channel_ranges(problem, found, percentiles), strict=True):
        bits = problem.bits(fold.site).activation_bits
        shared[fold.site.value] = reparameterize(problem, fold, low, high, bits)
    if found:
        problem.refresh()
    return shared


def find_folds(problem: Problem, method: str, notes: list[str], *, layers: bool = False) -> list[Fold]:
    """The values that can be reparameterized, and a sentence in `notes` on how many they are."""
    found = folds(problem.graph, problem.sites, layers=layers)
    if found:
        notes.append(f"{method}: {len(found)} values reparameterized, so that all their channels have one scale")
    else:
        what = "norm or layer" if layers else "norm"
        notes.append(f"{method}: no {what} feeds only linears and convolutions: nothing was reparameterized")
    return found


def channel_ranges(
    problem: Problem, found: list[Fold], percentiles: tuple[float, ...] = PERCENTILES
) -> list[tuple[Tensor, Tensor]]:
    """Ends (C,) of the range of each channel of each value, in the float network."""
    rows = sample_rows(problem, {f.site.value: f.site.channel_axis for f in found}, ROWS)
    return [
        row_percentile_search(
            rows[f.site.value].t(), RangeOptions(problem.bits(f.site).activation_bits, _scheme(f)), percentiles
        )
        for f in found
    ]


def channel_quantizer(fold: Fold, low: Tensor, high: Tensor, bits: int) -> UniformAffine:
    """The quantizer with a scale and zero point per channel whose codes `reparameterize` keeps.

    The arguments are those of `reparameterize`; scales are limited as there.
    """
    shared, zero_point, ratio, shift = shared_scale(*_channel_parameters(fold, low, high, bits), bits)
    zero_points = zero_point + shift.to(torch.int32)
    axis = fold.site.channel_axis
    return UniformAffine(ratio * shared, zero_points, bits=bits, signed=False, axis=axis, scheme="asymmetric")


def _channel_parameters(fold: Fold, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return affine_parameters(low, high, bits=bits, scheme=_scheme(fold), signed=False)


def _scheme(fold: Fold) -> Scheme:
    """Where an offset would leave an addition (zero padding behind), channels share their zero point."""
    return "asymmetric" if fold.shiftable else "symmetric"


def reparameterize(problem: Problem, fold: Fold, low: Tensor, high: Tensor, bits: int) -> UniformAffine:
    """Rewrite the graph so that one scale and zero point serve what had one for each channel.

    Where an offset would leave an addition (zero padding behind), channels share the zero point.

    Args:
        problem: its graph is changed, its float output is not.
        fold: the value.
        low: (C,) lower ends of the channels' ranges.
        high: (C,) upper ends.
        bits: width of the codes.

    Returns:
        The per-tensor quantizer of the changed value.
    """
    shared, zero_point, ratio, shift = shared_scale(*_channel_parameters(fold, low, high, bits), bits)
    balance(problem.graph, fold.producer, fold.site.channel_axis, fold.site.readers, ratio, -ratio * shared * shift)
    return UniformAffine(shared, zero_point, bits=bits, signed=False, scheme="asymmetric")


def shared_scale(scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s̃, z̃ (), r1 and r2 (C,) of per-channel parameters (C,): r1 = s / s̃, r2 = z - z̃, z̃ an integer.

    Channels whose scale is less than 1/64 of the mean, or more than 64 times, are brought to that limit.
    """
    shared = scale.mean()
    ratio = (scale / shared).clamp(1 / RATIO_LIMIT, RATIO_LIMIT)
    mean = zero_point.double().mean().round().clamp(0, (1 << bits) - 1).to(torch.int32)
    return shared, mean, ratio, (zero_point - mean).to(scale.dtype)


def log_sqrt2_from_percentiles(values: Tensor, bits: int, percentiles: tuple[float, ...]) -> LogSqrt2:
    """The log √2 quantizer whose scale is the percentile (of the values (n,), none negative) of least squared error."""
    ascending = values.float().sort().values
    best, least = None, float("inf")
    for p in percentiles:
        scale = ascending[min(round(p / 100 * (len(ascending) - 1)), len(ascending) - 1)]
        quantizer = LogSqrt2(scale.clamp_min(torch.finfo(torch.float32).eps), bits=bits)
        error = float((quantizer(ascending) - ascending).square().sum())
        if error < least:
            best, least = quantizer, error
    assert best is not None
    return best
