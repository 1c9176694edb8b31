"""Bias correction: the mean error that quantization adds to each output channel, taken out of the bias."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from qhyvit.calibration.collect import Watcher
from qhyvit.graph.ops import channel_axis
from qhyvit.progress import task
from qhyvit.quantized import QuantizedModel


def correct_biases(model: QuantizedModel, batches: Iterable[Tensor], count: int) -> None:
    """b ← b + mean(O) - mean(Ô) per output channel, for every quantized layer, in one pass.

    O is the layer's float output, Ô the output of the same layer with quantized weight and quantized input, both on
    the clean float input, so that each layer answers for its own error only. No layer is skipped for a bias of zero.

    Args:
        model: changed in place (`parameters.biases`).
        batches: calibration pictures (n, 3, H, W).
        count: number of pictures, for the progress bar.
    """
    sites = {s.node: s for s in model.sites.weights}
    weights = {name: model.parameters.weights[name].dequantize(model.codes(name)) for name in sites}
    inputs = {name: model.input_site(model.nodes[name], 0) for name in sites}
    sums: dict[str, Tensor] = {}
    numbers: dict[str, int] = {}

    class Local(Watcher):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            out = super().call_function(target, args, kwargs)
            name = self._node.name
            if name in sites:
                x, source = args[0], inputs[name]
                if source is not None and model.parameters.activations[source].axis is None:
                    x = model.parameters.activations[source](x)
                error = out - target(x, weights[name], *args[2:], **kwargs)
                axis = channel_axis(self._node)
                flat = error.movedim(axis, 0).flatten(1).double()
                sums[name] = sums.get(name, torch.zeros(len(flat), dtype=torch.float64)) + flat.sum(1)
                numbers[name] = numbers.get(name, 0) + flat.shape[1]
            return out

        def run_node(self, n: fx.Node):  # type: ignore[no-untyped-def]
            self._node = n
            return super().run_node(n)

    runner = Local(model.graph, (), lambda node, value: None)
    with torch.inference_mode(), task("Correcting biases", count) as advance:
        for images in batches:
            runner.run(images)
            advance(len(images))
    for name, total in sums.items():
        shift = (total / numbers[name]).float().clone()
        bias = model.bias(name)
        model.parameters.biases[name] = shift if bias is None else bias + shift
