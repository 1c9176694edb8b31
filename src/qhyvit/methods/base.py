"""What a method is given and what it gives back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from qhyvit.calibration.collect import collect
from qhyvit.calibration.statistics import TensorStatistics
from qhyvit.graph.ops import tidy
from qhyvit.graph.shapes import infer
from qhyvit.graph.sites import ActivationSite, Sites, WeightSite
from qhyvit.progress import task
from qhyvit.quantized import Parameters
from qhyvit.recipe import LayerBits, Recipe
from qhyvit.targets import TARGETS, Target


@dataclass
class Problem:
    """One net to be quantized.

    Attributes:
        graph: float graph; a method may change its weights as long as the float output stays the same.
        sites: what to find quantizers for.
        recipe: bits, schemes, options, seed.
        pictures: call it for a fresh stream of calibration batches (n, 3, H, W), the same ones each time.
        picture_count: how many pictures a stream holds.
        place: finds the sites of a graph, as recipe and target want them.
        per_channel: whether statistics hold the extremes of every channel whatever the recipe asks; a method that needs
            them sets it before it reads statistics.
    """

    graph: fx.GraphModule
    sites: Sites
    recipe: Recipe
    pictures: Callable[[], Iterator[Tensor]]
    picture_count: int
    place: Callable[[fx.GraphModule], Sites]
    per_channel: bool = False

    def refresh(self) -> None:
        """Find sites and statistics again after a change of the graph; constants that nobody reads any more go."""
        tidy(self.graph)
        infer(self.graph, next(self.pictures())[:1])
        self.sites = self.place(self.graph)
        self.__dict__.pop("statistics", None)

    @cached_property
    def statistics(self) -> dict[str, TensorStatistics]:
        """Ranges and histograms of every activation site, gathered in one pass when first asked for.

        A method that walks over the pictures before sets it to what its `Collector` saw on the way.
        """
        with task("Calibrating", self.picture_count) as advance:
            return collect(self.graph, self.sites, self.pictures(), advance=advance, channels=self.wants_channels)

    @property
    def wants_channels(self) -> bool:
        """Whether statistics hold the extremes of every channel."""
        asked = (self.bits(site).activations.granularity for site in self.sites.activations)
        return self.per_channel or "per-channel" in asked

    @property
    def target(self) -> Target:
        """What the quantized net is for."""
        return TARGETS[self.recipe.target]

    @property
    def integer_bias(self) -> bool:
        """Whether biases are rounded to int32 at the scale of their accumulator."""
        return self.target.integer_bias

    def bits(self, site: WeightSite | ActivationSite) -> LayerBits:
        """The recipe's settings for a site, overrides applied.

        The width of activations is that of the operands of products. In partial scope a value that is quantized only
        because a target wants an operator's output as codes has 8 bits at least: it is stored in 8 bits anyway.
        """
        asked = self.recipe.for_layer(site.module)
        if isinstance(site, ActivationSite) and site.role == "output" and self.recipe.scope == "partial":
            return replace(asked, activation_bits=max(8, asked.activation_bits))
        return asked


@dataclass(frozen=True)
class Method:
    """A method and what it needs of a target.

    Attributes:
        run: the function from a problem to parameters; its docstring cites the paper and lists the defaults.
        formats: kinds of activation quantizers that it may choose beside the uniform one. On a target without such a
            kind it falls back, and says so in `Parameters.notes`.
        operators: kinds of integer operators, likewise.
    """

    run: Callable[[Problem], Parameters]
    formats: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()

    def __call__(self, problem: Problem) -> Parameters:
        """Quantize."""
        return self.run(problem)

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return (self.run.__doc__ or "").strip().split("\n")[0]

    def lacking(self, target: Target) -> list[str]:
        """Its formats and operators that a target does not execute, and that are replaced there."""
        formats = [kind for kind in self.formats if not target.has_format(kind)]
        return formats + [kind for kind in self.operators if not target.has_operator(kind)]


def on_pictures(problem: Problem, first: int, last: int) -> Problem:
    """The same problem (graph, sites), its statistics and samples from calibration pictures `first` to `last` - 1."""

    def pictures() -> Iterator[Tensor]:
        at = 0
        for batch in problem.pictures():
            wanted = batch[max(first - at, 0) : max(last - at, 0)]
            at += len(batch)
            if len(wanted):
                yield wanted

    twin = copy.copy(problem)
    twin.__dict__.pop("statistics", None)
    twin.pictures, twin.picture_count = pictures, min(last, problem.picture_count) - first
    return twin


def with_settings(problem: Problem, **changes: Any) -> Problem:
    """The same problem (graph, sites, statistics) under a changed recipe; overrides by layer still win.

    Args:
        problem: not changed.
        changes: recipe keys, for instance `weights={"scheme": "asymmetric"}`.
    """
    twin = copy.copy(problem)
    twin.recipe = problem.recipe.updated(**changes)
    return twin
