"""Bias correction: each layer's mean output in the quantized net is that in the float net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qhyvit.calibration.bias import behind, correct_biases
from qhyvit.calibration.collect import Watcher
from qhyvit.pipeline import export, quantize
from qhyvit.quantized import QuantizedModel
from qhyvit.recipe import Recipe
from qhyvit.targets.onnxruntime import OrtSession
from quick import captured_once, ranges_only  # noqa: F401

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
    changes = ranges_only({"bits": "w4a4", "calibration": {"batch": 5}, **changes})
    return quantize(Layers(), calib=images(), input_size=SIDE, **changes)


def outputs(graph: torch.fx.GraphModule, model: QuantizedModel) -> dict[str, Tensor]:
    """Outputs of each layer by channel (C, n), whatever a graph puts before it."""
    found: dict[str, Tensor] = {}

    def keep(node: torch.fx.Node, value: Tensor) -> None:
        axis = 1 if value.ndim == 4 else -1
        found[node.name] = value.movedim(axis, 0).flatten(1)

    with torch.no_grad():
        Watcher(graph, [s.node for s in model.sites.weights], keep).run(images())
    return found


CHANGES: list[dict[str, Any]] = [{}, {"scope": "full"}, {"target": "simulate"}]


@pytest.mark.parametrize("changes", CHANGES)
def test_the_mean_error_vanishes_where_no_activation_function_reads(changes: dict[str, Any]) -> None:
    plain, model = quantized(**changes), quantized(bias_correction=True, **changes)
    (name,) = (s.node for s in model.sites.weights if s.module == "fourth")
    wanted = outputs(model.graph, model)[name].mean(1)
    before, after = (outputs(m.simulation(integer=False), m)[name].mean(1) for m in (plain, model))
    step = model.bias_scale(name)  # biases are whole multiples of it, where they are integers
    rounding = 1e-5 if step is None or not model.integer_bias else float(step.max())
    assert (before - wanted).abs().max() > max(2e-3, 2 * rounding)
    assert (after - wanted).abs().max() < 0.5 * rounding + 1e-5  # its own: it made up for those before it


@pytest.mark.parametrize("changes", CHANGES)
def test_no_other_bias_gives_less_error_behind_the_activation_function(changes: dict[str, Any]) -> None:
    plain, model = quantized(**changes), quantized(bias_correction=True, **changes)
    at = {s.module: s.node for s in model.sites.weights}
    before, after = (outputs(m.simulation(integer=False), m) for m in (plain, model))
    wanted = outputs(model.graph, model)
    for module, f in (("first", functional.silu), ("second", torch.relu), ("third", torch.tanh)):
        name = at[module]

        def error(y: Tensor, f: Any = f, target: Tensor = wanted[name]) -> Tensor:
            return (f(y) - f(target)).square().mean(1)

        others = torch.stack([error(after[name] + d) for d in torch.linspace(-0.5, 0.5, 201)])
        assert (error(after[name]) <= 1.02 * others.amin(0) + 1e-6).all(), module
        assert error(after[name]).sum() < error(before[name]).sum(), module


def test_a_shift_that_helps_nothing_is_not_made() -> None:
    y, noisy = torch.full((1, 50), -3.0), torch.full((1, 50), -2.0)
    assert behind(torch.relu, y, noisy) == 0  # flat: no slope tells anything
    assert behind(torch.relu, -y, -noisy) == pytest.approx(1)


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
    assert (runtime.run(images()) - uncorrected).abs().max() > 1.5e-2


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


class Dead(nn.Module):
    """A layer that reads nothing but zeros on the calibration pictures: all of what it gives is its bias."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        with torch.no_grad():
            self.first.bias.fill_(-100.0)  # type: ignore[union-attr]
            self.second.bias.copy_(torch.tensor([3.0, -2.0, 1e-3, 0.0, 40.0]))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x))).mean((2, 3))
        return out


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("method", ["mse", "erq"])
def test_a_bias_behind_a_dead_input_fits_int32(method: str, granularity: str, tmp_path: Any) -> None:
    recipe = Recipe(method=method, weights={"granularity": granularity})  # type: ignore[arg-type]
    model = quantize(Dead(), recipe=recipe, calib=images(), input_size=SIDE)
    with torch.no_grad():
        found = model.simulation()(images())
    wanted = Dead().second.bias
    assert torch.allclose(found, wanted.expand_as(found), atol=0.5)  # a step of the output's codes and more
    runtime = OrtSession(export(model, tmp_path / "model.onnx"), 1)
    assert torch.allclose(runtime.run(images()), found, atol=1e-3)
