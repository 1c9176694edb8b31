"""What a method is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from torch import Tensor, fx

from qhyvit.calibration.collect import collect
from qhyvit.calibration.statistics import TensorStatistics
from qhyvit.graph.shapes import infer
from qhyvit.graph.sites import ActivationSite, Sites, WeightSite
from qhyvit.progress import task
from qhyvit.quantized import Parameters
from qhyvit.recipe import LayerBits, Recipe


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
        """Find sites and statistics again after a change of the graph."""
        infer(self.graph, next(self.pictures())[:1])
        self.sites = self.place(self.graph)
        self.__dict__.pop("statistics", None)

    @cached_property
    def statistics(self) -> dict[str, TensorStatistics]:
        """Ranges and histograms of every activation site, gathered in one pass when first asked for."""
        asked = (self.bits(site).activations.granularity for site in self.sites.activations)
        channels = self.per_channel or "per-channel" in asked
        with task("Calibrating", self.picture_count) as advance:
            return collect(self.graph, self.sites, self.pictures(), advance=advance, channels=channels)

    def bits(self, site: WeightSite | ActivationSite) -> LayerBits:
        """The recipe's settings for a site, overrides applied.

        The width of activations is that of the operands of products. In partial scope a value that is quantized only
        because a target wants an operator's output as codes has 8 bits at least: the runtime stores it in 8 bits anyway.
        """
        asked = self.recipe.for_layer(site.module)
        if isinstance(site, ActivationSite) and site.role == "output" and self.recipe.scope == "partial":
            return replace(asked, activation_bits=max(8, asked.activation_bits))
        return asked


class Method(Protocol):
    """A method: a function from a problem to parameters; its docstring cites the paper and lists the defaults."""

    __doc__: str | None
    __name__: str

    def __call__(self, problem: Problem) -> Parameters: ...
