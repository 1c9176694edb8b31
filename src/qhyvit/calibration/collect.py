"""One pass over the calibration pictures that fills the statistics of every activation site."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.calibration.statistics import TensorStatistics
from qhyvit.errors import ModelError
from qhyvit.graph.sites import Sites

Watch = Callable[[fx.Node, Tensor], None]


class Watcher(fx.Interpreter):
    """Runs a graph and shows the value of each wanted node to a function; values are freed once no longer needed.

    Args:
        graph: any captured graph.
        wanted: names of the nodes to show.
        watch: receives the node and its value.
    """

    def __init__(self, graph: fx.GraphModule, wanted: Iterable[str], watch: Watch) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # the message of what `watch` raises stays the sentence that it is
        self._wanted, self._watch = frozenset(wanted), watch

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and show its value if it is wanted."""
        value = super().run_node(n)
        if n.name in self._wanted:
            self._watch(n, value)
        return value


class Collector:
    """Fills the statistics of every activation site from the values that it is shown.

    Args:
        sites: of the graph.
        channels: whether to keep the extremes of every channel too, which takes a tenth of the time.

    Attributes:
        statistics: by name of the value.
    """

    def __init__(self, sites: Sites, *, channels: bool = True) -> None:
        self.statistics = {
            s.value: TensorStatistics(channel_axis=(s.channel_axis or None) if channels else None)
            for s in sites.activations
        }

    def __call__(self, node: fx.Node, value: Tensor) -> None:
        """Take in the value of a node, one batch; a `ModelError` names the layer if it is not finite."""
        try:
            self.statistics[node.name].update(value)
        except ValueError as error:
            where = f"layer {node.meta['module']}" if node.meta.get("module") else node.name
            raise ModelError(f"In {where}, {error}; check the model's weights and the calibration pictures.") from None


def collect(
    graph: fx.GraphModule,
    sites: Sites,
    batches: Iterable[Tensor],
    *,
    advance: Callable[[int], None] = lambda n: None,
    channels: bool = True,
) -> dict[str, TensorStatistics]:
    """Statistics of every activation site in the float graph; memory does not depend on the number of pictures.

    Args:
        graph: the float graph.
        sites: its sites.
        batches: pictures (n, 3, H, W), streamed.
        advance: told the number of pictures done, for a progress bar.
        channels: as in `Collector`.

    Raises:
        ModelError: if a value is not finite; names the layer.
    """
    collector = Collector(sites, channels=channels)
    watcher = Watcher(graph, collector.statistics, collector)
    with torch.inference_mode():
        for images in batches:
            watcher.run(images)
            advance(len(images))
    return collector.statistics
