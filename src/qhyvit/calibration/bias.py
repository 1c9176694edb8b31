"""Bias correction: the mean error that quantization adds to each output channel, taken out of the bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.calibration.collect import Watcher
from qhyvit.graph.ops import channel_axis
from qhyvit.progress import task
from qhyvit.quantized import QuantizedModel

PICTURES = 64  # walked through the net together, so that each layer sees its predecessors corrected


def correct_biases(model: QuantizedModel, batches: Iterable[Tensor]) -> None:
    """b ← b + mean(O) - mean(Ô) per output channel, for every quantized layer, in order (methods of DFQ, 1906.04721).

    O is the layer's output in the float network, Ô in the quantized one whose earlier biases are corrected already. No
    layer is skipped for a bias of zero. Uses the first `PICTURES` pictures at most.

    Args:
        model: changed in place (`parameters.biases`).
        batches: calibration pictures (n, 3, H, W).
    """
    images = _first(batches, PICTURES)
    sites = {s.node for s in model.sites.weights}
    means: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Tensor) -> None:
        means[node.name] = _channel_means(node, value)

    with torch.inference_mode(), task("Correcting biases", 2) as advance:
        for piece in torch.split(images, 8):
            seen = dict(means)
            Watcher(model.graph, sites, keep).run(piece)
            for name, mean in means.items():
                means[name] = mean * len(piece) + seen.get(name, torch.zeros_like(mean))
        means = {name: total / len(images) for name, total in means.items()}
        advance(1)
        for name in sites:  # the simulation starts from the float biases
            model.parameters.biases.pop(name, None)
        shifts = _Corrector(model, means).shifts(images)
        advance(1)
    for name, shift in shifts.items():
        bias = model.bias(name)
        model.parameters.biases[name] = (shift if bias is None else bias + shift).clone()


class _Corrector(fx.Interpreter):
    """Runs the simulation and moves the output of each layer to its float mean before going on."""

    def __init__(self, model: QuantizedModel, means: dict[str, Tensor]) -> None:
        super().__init__(model.simulation(integer=False))
        self._means, self._shifts = means, dict[str, Tensor]()

    def shifts(self, images: Tensor) -> dict[str, Tensor]:
        """What each bias gains, by node."""
        self.run(images)
        return self._shifts

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.name in self._means:
            shift = (self._means[n.name] - _channel_means(n, out)).float()
            view = [1] * out.ndim
            view[channel_axis(n)] = -1
            out = out + shift.view(view)
            self._shifts[n.name] = shift
        return out


def _channel_means(node: fx.Node, value: Tensor) -> Tensor:
    return value.movedim(channel_axis(node), 0).flatten(1).double().mean(1)


def _first(batches: Iterable[Tensor], count: int) -> Tensor:
    found: list[Tensor] = []
    for images in batches:
        found.append(images)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]
