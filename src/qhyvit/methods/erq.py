"""ERQ (Zhong et al., ICML 2024, arXiv 2407.06794): weights make up for quantized activations, then for rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from qhyvit.data.views import with_views
from qhyvit.graph.ops import CONVOLUTIONS, argument, is_call, weight_of
from qhyvit.graph.sites import WeightSite
from qhyvit.methods.base import Problem
from qhyvit.methods.options import read_options
from qhyvit.methods.qhyvit import qhyvit
from qhyvit.methods.ranges import mse
from qhyvit.methods.repqvit import repqvit
from qhyvit.progress import task
from qhyvit.quantized import Parameters
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.prefix import Prefix, first_batches
from qhyvit.search.ridge import Moments, choose_rho, moments, reads_patches, solve
from qhyvit.search.rounding import Grid, compensated, quadratic

Base = Literal["mse", "repqvit", "qhyvit"]
BASES: dict[str, Callable[[Problem], Parameters]] = {"mse": mse, "repqvit": repqvit, "qhyvit": qhyvit}
HELD_OUT = 4  # every so-manieth batch, with all its views, is not fitted on
DAMPING = 1e-2  # least ridge of the rounding, against codes fitted to few rows
FACTORS = torch.linspace(0.7, 1.15, 19, dtype=torch.float64)  # of the base's weight scales


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        base: method that sets scales and zero points, with its own defaults.
        inputs: "quantized": of the net whose earlier layers are quantized, with the float net's outputs as targets;
            "float": layers are fitted by themselves.
        rho: ridges tried, as shares of the mean square of a layer's inputs.
        weights: "compensate": rounding in halves that make up for each other; "nearest".
        rescale: search the weight scales again for the changed weights.
        flips: refinements of a row's codes at each halving, at most.
        pictures: of the calibration pictures, at most.
        views: of each picture that weights are fitted to, in all: itself and random crops (not in the paper).
        rows: layers that see fewer positions of the pictures, crops not counted, than so many times their inputs keep
            their weights: fitted to these they are worse on others (not in the paper).
    """

    base: Base = "mse"
    inputs: Literal["quantized", "float"] = "quantized"
    rho: tuple[Annotated[float, Field(gt=0)], ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    weights: Literal["compensate", "nearest"] = "compensate"
    rescale: bool = True
    flips: Annotated[int, Field(ge=0)] = 100
    pictures: Annotated[int, Field(ge=1)] = 64
    views: Annotated[int, Field(ge=1)] = 1
    rows: Annotated[float, Field(ge=0)] = 0.0


def erq(problem: Problem) -> Parameters:
    """ERQ: each layer's weights are refitted in closed form to quantized inputs, and rounded to make up for each other.

    Zhong et al., ICML 2024, arXiv 2407.06794. *Aqer*: δ = argmin Σ‖y - (W + δ) x̄‖² + λ‖δ‖² for every linear and
    convolution, layer by layer. *Wqer*: half of the remaining input columns are rounded, refined by single flips (at
    most 100 per row), the other half makes up for the error, and so on until one is left. Only weights change.

    Other than the paper: convolutions too (unfolded; depthwise: one k² ridge per channel); λ = ρ · mean square of the
    inputs, ρ of {1e-4, …, 1e-1} by every fourth batch, held out (δ = 0 where none helps), instead of one λ for all
    layers; no ridge on the bias; flips are judged after the rest has made up for them and by their exact effect, and
    there is one more round of flips for the whole row; weight scales are searched again (0.7 to 1.15 times the base's).

    Options (defaults): base mse, inputs quantized, rho [1e-4, 1e-3, 1e-2, 1e-1], weights compensate, rescale true,
    flips 100, pictures 64, views 1, rows 0.
    """
    options = read_options(Options, "erq", problem.recipe.options)
    parameters = on_base(problem, options.base)
    compensate(problem, parameters, options)
    return parameters


def on_base(problem: Problem, base: str) -> Parameters:
    """What a method finds with its own defaults; the problem is afterwards as that method left it."""
    recipe = problem.recipe
    problem.recipe = recipe.model_copy(update={"options": {}})
    try:
        return BASES[base](problem)
    finally:
        problem.recipe = recipe


def compensate(problem: Problem, parameters: Parameters, options: Options) -> None:
    """Refit and round all layers, in order; fills `codes`, `biases`, weight scales and the report of `parameters`.

    Args:
        problem: the net, which is not changed.
        parameters: scales and zero points; changed in place.
        options: the method's.
    """
    pictures = with_views(first_batches(problem.pictures(), options.pictures), options.views, problem.recipe.seed)
    prefix = Prefix(problem, parameters, [view for views in pictures for view in views])
    sites = {s.node: s for s in problem.sites.weights}
    report, left = [], 0
    with torch.no_grad(), task("Compensating", len(sites)) as advance:
        for node in prefix.nodes:
            if node.name in sites and reads_patches(node):
                report.append(_Layer(prefix, node, sites[node.name], options).run())
            left += node.name in sites and not reads_patches(node)
            prefix.advance([node])
            advance(node.name in sites)
    parameters.report["erq"] = report
    changed = sum(entry["rho"] is not None for entry in report)
    parameters.notes.append(f"erq: {changed} of {len(sites)} layers compensated for their quantized inputs")
    if left:
        parameters.notes.append(f"erq: {left} convolutions that are not two-dimensional keep nearest rounding")


class _Layer:
    """One layer of the walk."""

    def __init__(self, prefix: Prefix, node: fx.Node, site: WeightSite, options: Options) -> None:
        self.prefix, self.node, self.site, self.options = prefix, node, site, options
        self.parameters = prefix.execution.parameters
        found = weight_of(prefix.execution.graph, node)
        assert found is not None
        self.weight, self.bias = found

    def run(self) -> dict[str, Any]:
        """Fit and round, where there are rows enough.

        Returns:
            Squared output errors per position, and the share of it that δ leaves held out.
        """
        fit, held_out = self._moments()
        every = fit if held_out is None else fit + held_out
        inputs = every.gram.shape[-1] - 1
        if every.rows < self.options.views * self.options.rows * inputs:
            return {"module": self.site.module, "rho": None}
        rho = choose_rho(fit, held_out, self.options.rho)
        groups, outputs = every.energy.shape
        rows = torch.cat(
            [self.weight.double().flatten(1), torch.zeros(len(self.weight), 1).to(self.weight.double())], 1
        )
        rows = rows.view(groups, outputs, -1)
        before = self._error(every, self._dequantized() - rows)
        change = solve(every, rho) if rho is not None else torch.zeros_like(rows)
        self._round(every, rows + change, rho)
        after = self._error(every, self._dequantized() - rows)
        entry = {"module": self.site.module, "rho": rho, "before": before, "after": after}
        if held_out is not None and rho is not None:
            entry["held_out"] = float(held_out.error(solve(fit, rho)).sum()) / (float(held_out.energy.sum()) or 1.0)
        return entry

    def _error(self, m: Moments, change: Tensor) -> float:
        return float(m.error(change).sum()) / m.rows

    def _moments(self) -> tuple[Moments, Moments | None]:
        """Those that are fitted on, and those held out (None with fewer batches than that takes)."""
        parts: list[Moments | None] = [None, None]
        execution, node = self.prefix.execution, self.node
        source = argument(node, "input").name
        values = self.prefix.noisy if self.options.inputs == "quantized" else self.prefix.clean
        for batch in range(self.prefix.batches):
            x = self.prefix.clean[source][batch]
            coded = execution.operands(node, self.prefix.at(values, node, batch))[0][0]
            part = batch // self.options.views % HELD_OUT == HELD_OUT - 1
            found, so_far = moments(node, self.weight, x, coded), parts[part]
            parts[part] = found if so_far is None else so_far + found
        assert parts[0] is not None
        return parts[0], parts[1]

    def _round(self, m: Moments, rows: Tensor, rho: float | None) -> None:
        """Round weights (G, O, K + 1), the bias behind them; the bias stays float and takes up the mean error."""
        penalty = m.penalty(max(rho or 0.0, DAMPING))
        gram, last = m.gram + torch.diag_embed(penalty), slice(-1, None)
        pull = gram[:, :-1, last] / gram[:, last, last]
        centred = gram[:, :-1, :-1] - pull @ gram[:, last, :-1]
        weight = rows[..., :-1]
        quantizer = self.parameters.weights[self.node.name]
        if self.options.rescale:
            quantizer = _rescaled(quantizer, weight, centred)
            self.parameters.weights[self.node.name] = quantizer
        grid = grid_of(quantizer, weight.shape)
        if self.options.weights == "compensate":
            codes = compensated(weight, centred, grid, self.options.flips)
        else:
            codes = grid.nearest(weight)
        self.parameters.codes[self.node.name] = codes.to(torch.int32).view(self.weight.shape)
        shift = rows[..., -1] - ((grid.value(codes) - weight) @ pull).squeeze(-1)
        bias = shift.flatten().to(self.weight.dtype)
        self.parameters.biases[self.node.name] = bias if self.bias is None else self.bias + bias

    def _dequantized(self) -> Tensor:
        """The quantized weight with what the bias has gained behind it, (G, O, K + 1) float64."""
        weight, bias = self.prefix.execution.layer(self.node, self.weight)
        gained = torch.zeros(len(weight), 1, dtype=torch.float64)
        if bias is not None:
            gained = (bias if self.bias is None else bias - self.bias).double().unsqueeze(1)
        rows = torch.cat([weight.double().flatten(1), gained], 1)
        groups = argument(self.node, "groups", 1) if is_call(self.node, CONVOLUTIONS) else 1
        return rows.view(groups, -1, rows.shape[1])


def grid_of(quantizer: UniformAffine, shape: torch.Size) -> Grid:
    """A weight quantizer's grid for weights as (G, O, K)."""
    scale, zero = (v.double().expand(shape[0] * shape[1]) for v in (quantizer.scale, quantizer.zero_point))
    form = (shape[0], shape[1], 1)
    return Grid(scale.reshape(form), zero.reshape(form), quantizer.quant_min, quantizer.quant_max)


def _rescaled(quantizer: UniformAffine, weight: Tensor, gram: Tensor) -> UniformAffine:
    """The quantizer with those scales, of some around its own, whose nearest rounding costs least."""

    def at(factor: Tensor) -> UniformAffine:
        kind: dict[str, Any] = {k: getattr(quantizer, k) for k in ("bits", "signed", "axis", "scheme")}
        return UniformAffine((quantizer.scale * factor).to(quantizer.scale.dtype), quantizer.zero_point, **kind)

    def cost(candidate: UniformAffine) -> Tensor:
        grid = grid_of(candidate, weight.shape)
        error = quadratic(grid.value(grid.nearest(weight)) - weight, gram).flatten()
        return error.sum() if quantizer.axis is None else error

    chosen, best = torch.ones_like(quantizer.scale, dtype=torch.float64), cost(quantizer)
    for factor in FACTORS:
        error = cost(at(factor))
        chosen, best = torch.where(error < best, factor, chosen), torch.minimum(error, best)
    return at(chosen)
