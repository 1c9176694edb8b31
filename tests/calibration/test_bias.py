"""Bias correction: each layer's mean output in the quantized net is that in the float net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qhyvit.calibration.bias import correct_biases
from qhyvit.calibration.collect import Watcher
from qhyvit.pipeline import export, quantize
from qhyvit.quantized import QuantizedModel
from qhyvit.targets.onnxruntime import OrtSession
from quick import captured_once  # noqa: F401

SIDE = 8


class Layers(nn.Module):
    """A convolution whose bias is zero, one with strides and groups, a linear over positions, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 8, 3, 2, 1, groups=4)
            self.third = nn.Linear(8, 12)
            self.fourth = nn.Linear(12, 5, bias=False)
        nn.init.zeros_(self.first.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(functional.silu(self.first(x))))
        x = torch.tanh(self.third(x.flatten(2).transpose(1, 2)))
        out: Tensor = self.fourth(x.mean(1))
        return out


def images() -> Tensor:
    return 0.5 + torch.randn(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6))


def quantized(**changes: Any) -> QuantizedModel:
    return quantize(Layers(), calib=images(), input_size=SIDE, bits="w4a4", calibration={"batch": 5}, **changes)


def channel_means(graph: torch.fx.GraphModule, model: QuantizedModel) -> dict[str, Tensor]:
    """Mean output of each layer by channel, whatever a graph puts before it."""
    found: dict[str, Tensor] = {}

    def keep(node: torch.fx.Node, value: Tensor) -> None:
        axis = 1 if value.ndim == 4 else -1
        found[node.name] = value.movedim(axis, 0).flatten(1).mean(1)

    with torch.no_grad():
        Watcher(graph, [s.node for s in model.sites.weights], keep).run(images())
    return found


@pytest.mark.parametrize("changes", [{}, {"scope": "full"}, {"target": "simulate"}])
def test_every_layers_mean_error_vanishes_in_the_quantized_net(changes: dict[str, Any]) -> None:
    plain, model = quantized(**changes), quantized(bias_correction=True, **changes)
    wanted = channel_means(model.graph, model)
    before, after = (channel_means(m.simulation(integer=False), m) for m in (plain, model))
    assert len(wanted) == 4
    for name, mean in wanted.items():
        step = model.bias_scale(name)  # biases are whole multiples of it, where they are integers
        rounding = 1e-5 if step is None or not model.integer_bias else float(step.max())
        assert (before[name] - mean).abs().max() > max(2e-3, 2 * rounding), name
        assert (after[name] - mean).abs().max() < 2 * rounding, name  # its own, and what those before it leave


def test_a_bias_of_zero_and_a_missing_one_are_corrected() -> None:
    plain, model = quantized(), quantized(bias_correction=True)
    assert not plain.parameters.biases
    at = {s.module: s.node for s in model.sites.weights}
    zero, missing = plain.bias(at["first"]), plain.bias(at["fourth"])
    assert zero is not None
    assert not zero.any()
    assert missing is None
    for name, size in (("first", 8), ("fourth", 5)):
        bias = model.bias(at[name])
        assert bias is not None
        assert bias.shape == (size,)
        assert bias.abs().min() > 0
    simulated = [m.simulation(integer=False) for m in (plain, model)]
    with torch.no_grad():
        assert not torch.equal(simulated[0](images()), simulated[1](images()))


def test_the_correction_reaches_the_runtime(tmp_path: Any) -> None:
    model = quantized(bias_correction=True, saturation="unsigned")
    runtime = OrtSession(export(model, tmp_path / "model.onnx"), 1)
    with torch.no_grad():
        torch.testing.assert_close(runtime.run(images()), model.simulation()(images()), rtol=0, atol=1e-2)
        uncorrected = quantized(saturation="unsigned").simulation()(images())
    assert (runtime.run(images()) - uncorrected).abs().max() > 2e-2


def test_batches_of_any_size_give_the_same_biases() -> None:
    found = []
    for size in (1, 7, 24):
        model = quantized()
        correct_biases(model, torch.split(images(), size))
        found.append(model.parameters.biases)
    for node, bias in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[node], bias, rtol=0, atol=1e-5)


def test_nothing_but_biases_is_changed() -> None:
    plain, model = quantized(), quantized(bias_correction=True)
    assert all(torch.equal(plain.codes(s.node), model.codes(s.node)) for s in plain.sites.weights)
    for name, quantizer in plain.parameters.activations.items():
        assert torch.equal(quantizer.scale, model.parameters.activations[name].scale)
    with torch.no_grad():
        assert torch.equal(plain.graph(images()), model.graph(images()))
