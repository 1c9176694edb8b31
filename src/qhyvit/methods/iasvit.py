"""I&S-ViT (Zhong, Hu, Lin, Chen, Ji, arXiv 2311.10126): shift-uniform-log2 softmax, weights tuned in smooth stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from qhyvit.calibration.samples import ProductSample, ValueSample
from qhyvit.graph.blocks import Unit, find_units, whole_transformers
from qhyvit.graph.ops import copy_graph, set_weight, weight_of
from qhyvit.graph.patterns import folds, softmax_outputs
from qhyvit.graph.sites import ActivationSite, source_site
from qhyvit.methods.base import Problem
from qhyvit.methods.formats import Formats, softmax_stand_in
from qhyvit.methods.options import read_options
from qhyvit.methods.repqvit import channel_quantizer, channel_ranges, find_folds, per_row, per_tensor, reparameterize
from qhyvit.quantized import Parameters
from qhyvit.quantizers.base import Quantizer
from qhyvit.quantizers.sulq import ShiftUniformLog2, sulq_from_range
from qhyvit.quantizers.uniform import Scheme
from qhyvit.search.errors import product_error
from qhyvit.search.gather import gather
from qhyvit.search.prefix import Execution, Prefix
from qhyvit.search.tuning import Settings, TunedUnit
from qhyvit.search.unit_walk import State, unit_batches, walk_units

PERCENTILES = (97.0, 98.0, 99.0, 99.5, 99.95, 99.97, 99.99, 99.995, 99.999)  # of weights
ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0, *(2.0**-k for k in range(1, 25)))
POSITIONS = 16  # sampled per layer; only products are looked at


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        iterations: of Adam, per unit and stage.
        batch: pictures that are run together, one batch per iteration.
        rate: learning rate of the weights.
        pictures: of the calibration pictures, at most.
        smooth: tune float weights on per-channel norm outputs first; False: quantized weights from the beginning, with
            the iterations of both stages.
        fold: per-channel norm outputs, brought to one scale; False: one scale per tensor throughout.
        softmax: "best": whichever of shift-uniform-log2 and uniform has less error in the product; "sulq": the former.
        state: folder that keeps finished units, so that a run that was stopped goes on.
    """

    iterations: Annotated[int, Field(ge=1)] = 200
    batch: Annotated[int, Field(ge=1)] = 16
    rate: Annotated[float, Field(gt=0)] = 4e-5
    pictures: Annotated[int, Field(ge=1)] = 128
    smooth: bool = True
    fold: bool = True
    softmax: Literal["best", "sulq"] = "best"
    state: str | None = None


def iasvit(problem: Problem) -> Parameters:
    """I&S-ViT: shift-uniform-log2 softmax; weights of a block tuned float on per-channel norms, then quantized.

    Zhong et al., arXiv 2311.10126. Softmax: 2^round(-s·(q - z)) - η, s and z from the extremes. Then block after block,
    by the squared error of the block's output, Adam on weights alone (norms and all steps stay): (a) weights float,
    norm outputs per channel, other activations per tensor, inputs from the float net; (b) the norm outputs brought to
    one scale, exactly, as RepQ-ViT does; (c) weights quantized per output channel, straight-through gradient, inputs
    from the quantized net. Targets always from the float net. Weights asymmetric, ranges from nine percentiles of 97 to
    99.999; activations asymmetric, percentiles 99.9, 99.99, 99.999.

    Other than the paper: η is found by the error of the product that the softmax feeds, among 35 values down to 2^-24,
    and the softmax is uniform where that is better (option); exactly 2^b levels; blocks are found in the graph, bridge
    blocks are blocks of their own, so are inverted residuals; all layers are tuned, convolutions too, and the first
    input has the recipe's width; 200 iterations per stage on 128 pictures, batch 16, rather than 1000 on 1024, batch
    64; a block whose error is not lower at the end keeps its weights, rounded to nearest.

    Options (defaults): iterations 200, batch 16, rate 4e-5, pictures 128, smooth true, fold true, softmax best,
    state none.
    """
    options = read_options(Options, "iasvit", problem.recipe.options)
    formats = Formats(problem, "iasvit")
    parameters = Parameters()
    scheme = formats.weight_scheme("asymmetric")
    for site in problem.sites.activations:
        parameters.activations[site.value] = per_tensor(problem, site)
    _set_softmaxes(problem, parameters, formats, options.softmax)
    settings = Settings(options.iterations, options.rate)
    kept = State(options.state, problem, settings) if options.state is not None else None
    stages = _Stages(problem, parameters, scheme, settings, options)
    units = whole_transformers(problem.graph, find_units(problem.graph))
    report = walk_units(
        problem,
        parameters,
        units,
        stages.learn,
        pictures=options.pictures,
        batch=options.batch,
        kept=kept,
        leave=stages.fold,
    )
    problem.refresh()
    parameters.report["iasvit"] = report
    better = sum(entry["after"] < entry["before"] for entry in report)
    parameters.notes.append(f"iasvit: {better} of {len(report)} units have less error than without tuning")
    parameters.notes += formats.notes()
    return parameters


class _Stages:
    """The three stages of each unit.

    Tuned weights live in a twin of the float graph, so that targets stay those of the float network; what is folded is
    folded in both.

    Args:
        problem: its graph is changed, its float output is not.
        parameters: hold a quantizer for every activation; those of foldable norm outputs become per-channel until they
            are folded. Gains weights, codes and biases.
        scheme: of weights.
        settings: of either stage.
        options: which stages there are.
    """

    def __init__(
        self, problem: Problem, parameters: Parameters, scheme: Scheme, settings: Settings, options: Options
    ) -> None:
        self.problem, self.parameters, self.scheme, self.smooth = problem, parameters, scheme, options.smooth
        self.settings = settings if options.smooth else replace(settings, iterations=2 * settings.iterations)
        self.twin = replace(problem, graph=copy_graph(problem.graph))
        self.bits = {s.node: problem.bits(s).weight_bits for s in problem.sites.weights}
        found = find_folds(problem, "iasvit", parameters.notes) if options.fold else []
        twins = {fold.site.value: fold for fold in folds(self.twin.graph, problem.sites)}
        ranges = zip(found, channel_ranges(problem, found), strict=True)
        self.folds = {fold.site.value: (fold, twins[fold.site.value], *ends) for fold, ends in ranges}
        for value, (fold, _, low, high) in self.folds.items():
            bits = problem.bits(fold.site).activation_bits
            parameters.activations[value] = channel_quantizer(fold, low, high, bits)
        self._set_weights(problem, list(self.bits))

    def learn(self, prefix: Prefix, unit: Unit, generator: torch.Generator) -> tuple[float, float, list[str]]:
        """Stages (a), (b) and (c) of one unit; the error with untuned weights and at the end."""
        tuned = TunedUnit(Execution(self.twin, self.parameters), unit)
        if self.smooth:
            self._keep(tuned.tune(unit_batches(prefix, unit), self.settings, generator, coded=False))
        self.fold(unit)
        layers, batches = list(tuned.weights()), unit_batches(prefix, unit)
        self._set_weights(self.problem, layers)
        before = TunedUnit(prefix.execution, unit).error(batches)
        plain = {name: self.parameters.weights[name] for name in layers}
        self._set_weights(self.twin, layers)
        self._keep(tuned.tune(batches, self.settings, generator, coded=True))
        after = tuned.error(batches)
        if after >= before:
            self.parameters.weights |= plain
            return before, before, []
        self._write(layers)
        return before, after, []

    def fold(self, unit: Unit) -> None:
        """Stage (b): the norms of a unit that are not folded yet, with the layers behind them."""
        for value in unit.nodes:
            if value in self.folds:
                fold, twin, low, high = self.folds.pop(value)
                bits = self.problem.bits(fold.site).activation_bits
                for problem, found in ((self.problem, fold), (self.twin, twin)):
                    self.parameters.activations[value] = reparameterize(problem, found, low, high, bits)

    def _keep(self, weights: dict[str, Any]) -> None:
        nodes = {n.name: n for n in self.twin.graph.graph.nodes}
        for name, weight in weights.items():
            set_weight(self.twin.graph, nodes[name], weight, None)

    def _set_weights(self, problem: Problem, layers: list[str]) -> None:
        """Scales and zero points for the weights that a graph has now."""
        for name, weight, _ in self._constants(problem, layers):
            self.parameters.weights[name] = per_row(weight, self.bits[name], self.scheme, PERCENTILES)

    def _write(self, layers: list[str]) -> None:
        """Codes of the tuned weights; the biases that a fold of tuned weights has changed in another way."""
        plain = {name: bias for name, _, bias in self._constants(self.problem, layers)}
        for name, weight, bias in self._constants(self.twin, layers):
            self.parameters.codes[name] = self.parameters.weights[name].quantize(weight)
            if bias is not None and not torch.equal(bias, plain[name]):
                self.parameters.biases[name] = bias

    @staticmethod
    def _constants(problem: Problem, layers: list[str]) -> list[tuple[str, Any, Any]]:
        nodes = {n.name: n for n in problem.graph.graph.nodes}
        return [(name, *weight_of(problem.graph, nodes[name])) for name in layers]  # type: ignore[misc]


def _set_softmaxes(problem: Problem, parameters: Parameters, formats: Formats, wanted: str) -> None:
    """Quantizers of softmax outputs, and sentences on them."""
    outputs = softmax_outputs(problem.graph, problem.sites)
    open_ = [s for s, _ in outputs if formats.has_for_softmax(ShiftUniformLog2.kind, s)]
    samples = gather(problem, "none", POSITIONS) if open_ else {}
    shifted = 0
    for site, _ in outputs:
        chosen: Quantizer = softmax_stand_in(problem, site)
        if site in open_:
            others = [chosen, per_tensor(problem, site)] if wanted == "best" else []
            tried = [*_candidates(problem, site), *others]
            errors = torch.stack([_error(problem, site, samples, q) for q in tried])
            chosen = tried[int(errors.argmin())]
            shifted += isinstance(chosen, ShiftUniformLog2)
        parameters.activations[site.value] = chosen
    if not outputs:
        parameters.notes.append("iasvit: no quantized softmax feeds a product: shift-uniform-log2 applies nowhere")
    if open_:
        parameters.notes.append(
            f"iasvit: {shifted} of {len(open_)} softmax outputs are shift-uniform-log2, the rest uniform, by error"
        )


def _candidates(problem: Problem, site: ActivationSite) -> list[ShiftUniformLog2]:
    """One for each η."""
    statistics, bits = problem.statistics[site.value], problem.bits(site).activation_bits
    return [sulq_from_range(statistics.low, statistics.high, eta, bits=bits) for eta in ETAS]


def _error(problem: Problem, site: ActivationSite, samples: dict[str, Any], quantizer: Quantizer) -> torch.Tensor:
    """‖(Â - A)V‖² over all matrix products that read the softmax; ‖Â - A‖² where none does."""
    nodes, found = {n.name: n for n in problem.graph.graph.nodes}, []
    for name, sample in samples.items():
        if isinstance(sample, ProductSample):
            for i in range(2):
                if source_site(problem.sites, nodes[name], i) == site.value:
                    a, b = (quantizer(sample.a), sample.b) if i == 0 else (sample.a, quantizer(sample.b))
                    found.append(product_error(sample, a, b))
    if not found:
        values: ValueSample = samples[f"value:{site.value}"]
        found = [((quantizer(values.x) - values.x).square() * values.weight).sum()]
    return torch.stack(found).sum()
