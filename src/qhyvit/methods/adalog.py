"""AdaLog (Wu, Chen, Zhong, Huang, Wang, arXiv 2407.12951): an adaptive logarithm base and a progressive search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from qhyvit.calibration.percentiles import percentile_search
from qhyvit.calibration.ranges import RANGES, RangeOptions
from qhyvit.calibration.samples import ProductSample
from qhyvit.graph.ops import MATMUL, is_call
from qhyvit.graph.patterns import MINIMA, activation_outputs, readers, softmax_outputs
from qhyvit.graph.sites import ActivationSite, WeightSite
from qhyvit.methods.base import Problem, with_settings
from qhyvit.methods.formats import Formats, softmax_stand_in
from qhyvit.methods.options import read_options
from qhyvit.methods.ranges import set_ranges
from qhyvit.methods.repqvit import fold_norms
from qhyvit.quantized import Parameters
from qhyvit.quantizers.adalog import NUMERATORS, AdaLog
from qhyvit.quantizers.base import Quantizer
from qhyvit.quantizers.uniform import Scheme, UniformAffine, affine_parameters, code_range
from qhyvit.search.errors import product_error
from qhyvit.search.fpcs import Errors, fpcs, zero_points_around
from qhyvit.search.gather import gather
from qhyvit.search.walk import ActivationError, Walk, WeightErrors

GAIN = 0.999  # an operand is changed if its error falls to this share, so that rounds come to an end


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        candidates, keep, steps: of the search over scale and zero point.
        rounds: alternations of weights and activations, at most.
        positions: sampled per layer.
        fold: reparameterize norm outputs as RepQ-ViT does, where weights and activations have the same width.
        activations: format of GELU, SiLU and hard-swish outputs: "adalog", "uniform", or the "best" of both by error.
    """

    candidates: Annotated[int, Field(ge=4)] = 128
    keep: Annotated[int, Field(ge=1)] = 16
    steps: Annotated[int, Field(ge=1)] = 6
    rounds: Annotated[int, Field(ge=1)] = 3
    positions: Annotated[int, Field(ge=16)] = 256
    fold: bool = True
    activations: Literal["adalog", "uniform", "best"] = "best"


def adalog(problem: Problem) -> Parameters:
    """AdaLog: logarithms of adaptive base for softmax and GELU outputs; scale and zero point by progressive search.

    Wu et al., ECCV 2024, arXiv 2407.12951. Softmax outputs: 2^(-k·q/37), q of 10..138 by the error of the product.
    Outputs of GELU (here also SiLU and hard-swish): shifted to be non-negative, q and scale searched (all q, the best 8
    with 16 scales, the best 32 refined 4-fold). All else uniform, weights asymmetric per channel, activations
    asymmetric per tensor: 128 candidates of zero point × scale (from the 10–90 % range to the whole), the best 16
    refined 8-fold, 6 steps; squared error of the layer's output on 256 sampled positions; 3 rounds, weights then
    activations. Norm outputs are reparameterized (RepQ-ViT) where weights and activations have the same width.

    Other than the released code: the best candidates stay in the refined grid; zero points are tried around that of the
    min-max range, not around the middle code, which suits two-sided values only; products have one scale per tensor
    (there one per head); outputs of activation functions are uniform where that is better (option); the first
    convolution's input has the recipe's width.

    Options (defaults): candidates 128, keep 16, steps 6, rounds 3, positions 256, fold true, activations best.
    """
    options = read_options(Options, "adalog", problem.recipe.options)
    formats = Formats(problem, "adalog")
    notes: list[str] = []
    shared = {}
    if options.fold and problem.recipe.weight_bits == problem.recipe.activation_bits:
        shared = fold_norms(problem, "adalog", notes)
    elif options.fold:
        notes.append("adalog: weights and activations differ in width: norm outputs are not reparameterized")
    scheme = formats.weight_scheme("asymmetric")
    settings = with_settings(
        problem,
        weights={"granularity": "per-channel", "scheme": scheme},
        activations={"granularity": "per-tensor", "scheme": "asymmetric"},
    )
    parameters = set_ranges(settings, "mse")
    parameters.activations |= shared
    chooser = _Progressive(settings, options, scheme)
    softmaxes = softmax_outputs(problem.graph, problem.sites)
    for site, _ in softmaxes:
        if formats.has_for_softmax(AdaLog.kind, site):
            chooser.softmaxes.add(site.value)
            parameters.activations[site.value] = AdaLog(torch.ones(()), bits=chooser.bits(site), q=37)
        else:
            chooser.fixed.add(site.value)
            parameters.activations[site.value] = softmax_stand_in(settings, site)
    activations = activation_outputs(problem.graph, problem.sites)
    if options.activations != "uniform":
        chooser.shifts = {
            site.value: -MINIMA[node.target]
            for site, node in activations
            if formats.has(AdaLog.kind, "outputs of activation functions are uniform", chooser.bits(site))
        }
    if not softmaxes:
        notes.append("adalog: no quantized softmax feeds a product: no logarithm there")
    if not activations:
        notes.append("adalog: no quantized GELU, SiLU or hard-swish feeds a layer: no logarithm there")
    walk = Walk(problem, parameters, gather(problem, "none", options.positions), chooser)
    walk.run(options.rounds)
    rest = len(parameters.activations) - len(walk.searched)
    if rest:
        notes.append(f"adalog: {rest} values that no layer or product reads have the range of method mse")
    parameters.notes += notes + formats.notes()
    return parameters


class _Progressive:
    """Scale, zero point and base by progressive search."""

    def __init__(self, problem: Problem, options: Options, scheme: Scheme) -> None:
        self._problem, self._options, self._scheme = problem, options, scheme
        self._nodes = {n.name: n for n in problem.graph.graph.nodes}
        self.softmaxes: set[str] = set()
        self.fixed: set[str] = set()
        self.shifts: dict[str, float] = {}  # of functions with a small negative side

    def bits(self, site: ActivationSite) -> int:
        return self._problem.bits(site).activation_bits

    def weight(self, site: WeightSite, weight: Tensor, current: UniformAffine, errors: WeightErrors) -> UniformAffine:
        bits = self._problem.bits(site).weight_bits
        rows = weight.flatten(1).float()
        low, high = rows.amin(1), rows.amax(1)
        inner = (rows.quantile(0.9, 1) - rows.quantile(0.1, 1)).clamp(min=0) if rows.shape[1] > 1 else high - low
        count = min(16, 1 << (bits - 1)) if self._scheme == "asymmetric" else 1

        def build(scale: Tensor, zero: Tensor) -> UniformAffine:
            return UniformAffine(scale, zero, bits=bits, signed=True, axis=0, scheme=self._scheme)

        scale, zero, found = self._search(
            lambda s, z: errors(build(s, z)), (low, high, inner), bits, count, self._scheme, signed=True
        )
        before = errors(current)
        better = found < GAIN * before
        if not bool(better.any()):
            return current
        return build(torch.where(better, scale, current.scale), torch.where(better, zero, current.zero_point))

    def activation(self, site: ActivationSite, current: Quantizer, error: ActivationError) -> Quantizer:
        if site.value in self.fixed:
            return current
        least = float(error(current))
        if site.value in self.softmaxes:
            rebased = self._base(current, error)
            return rebased if float(error(rebased)) < GAIN * least else current
        tried: list[Quantizer] = []
        if site.value in self.shifts:
            tried.append(self._base_and_scale(site, self.shifts[site.value], error))
        if site.value not in self.shifts or self._options.activations == "best":
            tried.append(self._uniform(site, error))
        found = tried[int(torch.stack([error(q) for q in tried]).argmin())]
        must = site.value in self.shifts and self._options.activations == "adalog" and not isinstance(current, AdaLog)
        return found if must or float(error(found)) < GAIN * least else current

    def product_error(self, sample: ProductSample, a: Tensor, b: Tensor) -> Tensor:
        return product_error(sample, a, b)

    def beside_float(self, site: ActivationSite) -> bool:
        return False

    def _uniform(self, site: ActivationSite, error: ActivationError) -> UniformAffine:
        bits, statistics = self.bits(site), self._problem.statistics[site.value]
        inner_low, inner_high = RANGES["percentile"](statistics, RangeOptions(bits, "asymmetric", percentile=90))
        ends = statistics.low.float().view(1), statistics.high.float().view(1)
        in_product = any(is_call(r, MATMUL) for r in readers(self._nodes, site))
        count = min(16, 1 << (bits - 1 if in_product else bits))

        def build(scale: Tensor, zero: Tensor) -> UniformAffine:
            return UniformAffine(scale[0], zero[0], bits=bits, signed=False, scheme="asymmetric")

        scale, zero, _ = self._search(
            lambda s, z: error(build(s, z)).view(1),
            (*ends, (inner_high - inner_low).float().view(1)),
            bits,
            count,
            "asymmetric",
            signed=False,
        )
        return build(scale, zero)

    def _search(
        self,
        errors: Errors,
        spread: tuple[Tensor, Tensor, Tensor],
        bits: int,
        count: int,
        scheme: Scheme,
        *,
        signed: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Progressive search; `spread` is the lowest and highest value and the 10–90 % range, (C,) each."""
        low, high, inner = spread
        largest, centre = affine_parameters(low, high, bits=bits, scheme=scheme, signed=signed)
        share = (inner / (high - low).clamp_min(torch.finfo(torch.float32).tiny)).clamp(0.05, 1)
        return fpcs(
            errors,
            largest * share,
            largest,
            zero_points_around(centre, count, *code_range(bits, signed)),
            candidates=self._options.candidates,
            keep=self._options.keep,
            steps=self._options.steps,
        )

    @staticmethod
    def _base(current: Quantizer, error: ActivationError) -> AdaLog:
        """All bases at the scale that is."""
        assert isinstance(current, AdaLog)
        tried = [AdaLog(current.scale, bits=current.bits, q=q, shift=current.shift) for q in NUMERATORS]
        return tried[int(torch.stack([error(q) for q in tried]).argmin())]

    def _base_and_scale(self, site: ActivationSite, shift: float, error: ActivationError) -> AdaLog:
        bits, statistics = self.bits(site), self._problem.statistics[site.value]
        top = statistics.high.float() + shift
        clipped = percentile_search(statistics, RangeOptions(bits, "asymmetric"))[1].float() + shift

        def best(candidates: list[AdaLog], count: int) -> list[AdaLog]:
            found = torch.stack([error(q) for q in candidates])
            return [candidates[i] for i in found.topk(min(count, len(candidates)), largest=False).indices.tolist()]

        def build(scale: Tensor, q: int) -> AdaLog:
            return AdaLog(scale.clamp_min(1e-6), bits=bits, q=q, shift=shift)

        bases = best([build(clipped, q) for q in NUMERATORS], 8)
        scales = torch.linspace(0.25, 1, 16)
        kept = best([build(top * f, base.q) for base in bases for f in scales] + bases[:1], 32)
        width = top * 0.75 / 15
        fine = [build(k.scale + width * f, k.q) for k in kept for f in (-0.375, -0.125, 0.125, 0.375)]
        return best(fine + kept, 1)[0]
