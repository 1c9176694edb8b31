"""Q-HyViT (Lee, Kwon et al., arXiv 2303.12557): scale, granularity and scheme by Hessian-weighted reconstruction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from qhyvit.calibration.gradients import Source
from qhyvit.calibration.overflow import Overflows, count_overflows
from qhyvit.graph.bridges import find_bridges
from qhyvit.graph.ops import argument
from qhyvit.graph.sites import ActivationSite, Sites, WeightSite
from qhyvit.methods.base import Problem, on_pictures
from qhyvit.methods.options import read_options
from qhyvit.methods.ranges import set_ranges
from qhyvit.progress import task
from qhyvit.quantized import Parameters, QuantizedModel
from qhyvit.recipe import Granularity
from qhyvit.search.balancing import balance_all
from qhyvit.search.blocks import reconstruct_bridges
from qhyvit.search.equalising import equalise_streams
from qhyvit.search.errors import LayerError
from qhyvit.search.factors import FACTORS
from qhyvit.search.gather import gather
from qhyvit.search.granularity import not_worth_channels
from qhyvit.search.layers import LayerSearch, Spaces, layer_errors
from qhyvit.search.operands import Space
from qhyvit.targets import TARGETS

Positive = Annotated[int, Field(ge=1)]
Variant = Literal["ours", "paper", "released"]
HELD_OUT = 4  # one picture in so many tells what evening out is worth
FEWEST = 8  # pictures; with fewer all are used for both
RELEASED_FACTORS = 0.01 + 0.0119 * torch.arange(100)


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults in variant "ours".

    Attributes:
        variant: rules to start from. "paper": gradients of the default-quantized net, the full search of granularity
            and scheme from min-max, block error inside bridge blocks. "released": what the authors' code does:
            symmetric only, granularity by a fixed rule, 100 candidates up to 1.1881, gradients at the float point, and
            later bridge members fitted to the float layer's answer to a noisy input.
        gradient: where g comes from: "default_quant" (the paper's), "fisher", "float" (noise), or "none" (plain
            squared error: on the nets measured so far the weights cost SQNR, see docs/methods.md).
        granularity, scheme: whether to search them; otherwise the recipe's are kept.
        rounds: alternations of weights and activations.
        bridges: measure members of a bridge block by the block's output.
        residual_term: count what else a block hands out, such as the stream past the attention, like its outputs.
        positions: sampled per layer.
        coarse: try every so many of the 100 candidates first; 1 is brute force, in every round.
        one_sided: also shrink each end of an activation range alone (not in the paper).
        balance: shift and scale channels exactly where that lowers the error (per-channel granularity in a form that
            every target executes; not in the paper).
        held_out: give an activation a scale per channel only where that pays on pictures that gave no ranges (not in
            the paper).
        bias: leave each layer's mean error to its bias, which is corrected at the end (not in the paper).
        start: range setting of the incumbent that the search has to beat.
    """

    variant: Variant = "ours"
    gradient: Source = "none"
    granularity: bool = True
    scheme: bool = True
    rounds: Positive = 3
    bridges: bool = True
    residual_term: bool = True
    positions: Positive = 512
    coarse: Positive = 4
    one_sided: bool = True
    balance: bool = True
    held_out: bool = True
    bias: bool = True
    start: Literal["minmax", "percentile", "mse", "kl"] = "mse"


_PAPER = Options(
    variant="paper",
    gradient="default_quant",
    one_sided=False,
    balance=False,
    held_out=False,
    bias=False,
    start="minmax",
)
VARIANTS: dict[str, Options] = {
    "ours": Options(),
    "paper": _PAPER,
    "released": replace(_PAPER, variant="released", gradient="float", granularity=False, scheme=False),
}


def options_of(given: dict[str, Any]) -> Options:
    """Options from a recipe: those of the variant, changed by what else is given.

    Raises:
        RecipeError: on an unknown key or a value that is not allowed.
    """
    variant = read_options(Options, "qhyvit", given).variant
    return read_options(Options, "qhyvit", {**vars(VARIANTS[variant]), **given})


def qhyvit(problem: Problem) -> Parameters:
    """Q-HyViT: scale, granularity and scheme of each operand by reconstruction error, bridge blocks as a whole."""
    options = options_of(problem.recipe.options)
    problem.per_channel = True
    note, whole, overflows = _even_out(problem, options)
    samples = gather(problem, options.gradient, options.positions)
    parameters = set_ranges(problem, options.start)
    parameters.notes += [note] if note else []
    parameters.notes += overflows.notes(count_overflows(problem) if options.balance else None)
    parameters.report["overflow"] = overflows.to_dict()
    spaces = _spaces(problem, options, whole)
    search = LayerSearch(problem, parameters, samples, spaces)
    with task("Searching", len(search.units)) as advance:
        for unit in search.units:
            unit()
            advance(1)
    if options.bridges and options.variant == "released":
        _released_bridges(problem, parameters, options, spaces)
    elif options.bridges:
        blocks = reconstruct_bridges(problem, parameters, spaces, options.gradient, residual_term=options.residual_term)
        parameters.report["bridges"] = blocks
        parameters.notes.append(_bridge_note(blocks))
    parameters.correct_biases = options.bias
    return parameters


def _even_out(problem: Problem, options: Options) -> tuple[str | None, set[str], Overflows]:
    """Shift and scale channels, streams first, and find the values that are to keep one scale.

    The channels' ranges are read from most pictures, what a change is worth from the others: an evened channel is
    clipped wherever a new picture leaves the range that the known ones had.

    Returns:
        A sentence for the report, and names of values; None and no names where the options ask for neither. And what
        overflowed before.
    """
    judged = options.held_out and options.granularity and problem.target.per_channel_activations
    if not (options.balance or judged):
        return None, set(), count_overflows(problem)
    known, held_out = problem, problem
    if problem.picture_count >= FEWEST:
        split = problem.picture_count - problem.picture_count // HELD_OUT
        known, held_out = on_pictures(problem, 0, split), on_pictures(problem, split, problem.picture_count)

    def sample() -> tuple[dict[str, Any], dict[str, LayerError]]:
        held_out.sites = known.sites
        samples = gather(held_out, options.gradient, options.positions // 2, only_layers=True)
        return samples, layer_errors(problem.graph, samples)

    sampled = sample()
    if known is not problem:  # sampling has met the other pictures' statistics
        problem.statistics = {n: s.merged(held_out.statistics[n]) for n, s in known.statistics.items()}
    overflows = count_overflows(problem)
    streams = equalise_streams(known, *sampled) if options.balance else 0
    if streams:
        sampled = sample()
    whole = not_worth_channels(known, *sampled) if judged else set()
    if not options.balance:
        return None, whole, overflows
    changed = balance_all(known, *sampled)
    if streams or changed:
        problem.refresh()
    note = f"qhyvit: {streams} residual streams and {len(changed)} single values shifted or scaled by channel"
    return note, whole, overflows


def _bridge_note(blocks: list[dict[str, Any]]) -> str:
    if not blocks:
        return "qhyvit: no bridge blocks, no attention follows convolutions"
    before, after = (sum(b[key] for b in blocks) / len(blocks) for key in ("before", "after"))
    return f"qhyvit: {len(blocks)} bridge blocks, mean relative error {before:.2g} before, {after:.2g} after"


def _spaces(problem: Problem, options: Options, whole: Collection[str] = ()) -> Spaces:
    """What may be chosen; the values in `whole` get one scale."""
    target, zero = TARGETS[problem.recipe.target], problem.recipe.ranges.zero
    released = options.variant == "released"
    factors = RELEASED_FACTORS if released else FACTORS

    def weight(site: WeightSite) -> Space:
        asked = problem.bits(site)
        schemes: Any = (asked.weights.scheme,)
        if options.scheme and target.asymmetric_weights:
            schemes = ("symmetric", "asymmetric")
        grains: tuple[Granularity, ...] = (asked.weights.granularity,)
        if options.granularity:
            grains = ("per-tensor", "per-channel")
        if released:
            schemes, grains = ("symmetric",), ("per-channel" if site.kind == "conv" else "per-tensor",)
        # Few numbers a channel, fewer still that gradients weigh: the error jumps from candidate to candidate.
        fine = max(1, options.coarse // (2 if options.gradient == "none" else 4))
        return Space(asked.weight_bits, True, schemes, grains, zero, coarse=fine, factors=factors)

    def activation(site: ActivationSite) -> Space:
        asked = problem.bits(site)
        schemes: Any = ("symmetric", "asymmetric") if options.scheme else (asked.activations.scheme,)
        grains: tuple[Granularity, ...] = (asked.activations.granularity,)
        if options.granularity and target.per_channel_activations and site.value not in whole:
            grains = ("per-tensor", "per-channel")
        if released:
            schemes = ("symmetric",)
            by_channel = _read_by_groups(problem, site) and target.per_channel_activations
            grains = ("per-channel",) if by_channel else ("per-tensor",)
        return Space(
            asked.activation_bits,
            False,
            schemes,
            grains,
            zero,
            one_sided=options.one_sided,
            coarse=options.coarse,
            factors=factors,
        )

    return Spaces(weight, activation, options.rounds, options.bias)


def _read_by_groups(problem: Problem, site: ActivationSite) -> bool:
    """Whether a convolution with groups reads a value (the released code's rule for per-channel activations)."""
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    kinds = {s.node: s.kind for s in problem.sites.weights}
    return any(kinds.get(r) == "conv" and argument(nodes[r], "groups", 1) > 1 for r in site.readers)


def _released_bridges(problem: Problem, parameters: Parameters, options: Options, spaces: Spaces) -> None:
    """Fit each later member of a block to the float layer's answer to inputs that earlier members made noisy."""
    blocks = find_bridges(problem.graph)
    for position in range(1, max((len(b.members) for b in blocks), default=0)):
        early = {m for b in blocks for m in b.members[:position]}
        only = Sites(
            tuple(s for s in problem.sites.weights if s.node in early),
            tuple(
                replace(s, readers=tuple(r for r in s.readers if r in early))
                for s in problem.sites.activations
                if any(r in early for r in s.readers)
            ),
        )
        noisy = QuantizedModel(problem.graph, only, parameters, problem.recipe, {}, False).simulation(integer=False)
        samples = gather(problem, options.gradient, options.positions, graph=noisy)
        search = LayerSearch(problem, parameters, samples, spaces)
        for block in blocks:
            if position < len(block.members) and block.members[position] in samples:
                search.layer(block.members[position])
