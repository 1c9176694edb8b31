"""Soft rounding, learned steps and block reconstruction against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid import SIDE, Hybrid, logits, problem
from qhyvit.errors import RecipeError
from qhyvit.graph.ops import weight_of
from qhyvit.methods import METHODS, Problem
from qhyvit.methods.ranges import set_ranges
from qhyvit.pipeline import quantize
from qhyvit.quantized import Parameters, QuantizedModel
from qhyvit.quantizers.uniform import UniformAffine, uniform_from_range
from qhyvit.search import unit_walk
from qhyvit.search.reconstruction import LearnedStep, SoftRounding, UnitLearner
from qhyvit.verification import verify
from tiny import calibration

METHODS_HERE = ["adaround", "brecq", "qdrop"]
QUICK: dict[str, Any] = {"base": "mse", "iterations": 40, "batch": 4, "rate": 0.05}


def rounding(bits: int = 4) -> tuple[Tensor, UniformAffine, SoftRounding]:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    rows = weight.flatten(1)
    quantizer = uniform_from_range(rows.amin(1), rows.amax(1), bits=bits, scheme="asymmetric", signed=True, axis=0)
    return weight, quantizer, SoftRounding(weight, quantizer)


def test_the_first_h_reproduces_the_float_weights_and_rounds_to_nearest() -> None:
    weight, quantizer, soft = rounding()
    inside = (quantizer(weight) - weight).abs() <= 0.5 * quantizer.scale.view(-1, 1, 1, 1)
    # a zero point is an integer, so that the outermost weights may lie half a step outside the codes
    values = soft.values()
    low, high = ((c - soft.zero) * soft.scale for c in (soft.low, soft.high))
    within = (weight >= low) & (weight <= high) & inside
    assert float(within.float().mean()) > 0.9
    assert torch.allclose(values[within], weight[within], atol=2e-4 * float(quantizer.scale.max()))
    assert torch.equal(soft.codes(), quantizer.quantize(weight))


def test_codes_are_the_floor_or_one_more_and_h_ends_at_0_or_1() -> None:
    weight, quantizer, soft = rounding()
    optimizer = torch.optim.Adam([soft.v], lr=0.05)
    for i in range(400):
        loss = soft.regularization(20 - 18 * i / 400) + 0.2 * (soft.values() - 0.9 * weight).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    h = soft.h().detach()
    assert float(torch.minimum(h, 1 - h).max()) < 0.02
    up = soft.codes() - torch.floor(weight / soft.scale) - soft.zero
    clipped = (soft.codes() == quantizer.quant_min) | (soft.codes() == quantizer.quant_max)
    assert bool(((up == 0) | (up == 1) | clipped).all())
    assert not torch.equal(soft.codes(), quantizer.quantize(weight))
    assert torch.equal(soft.hard_values(), quantizer.dequantize(soft.codes()))


def test_the_gradient_of_a_step_is_that_of_lsq() -> None:
    x = torch.tensor([-9.0, -1.3, 0.2, 0.9, 2.6, 40.0])
    scale = torch.tensor(0.5, requires_grad=True)
    out = LearnedStep.apply(x, scale, torch.tensor(4), 0, 15)
    v = x / 0.5
    expected = torch.where(v < -4, -4.0, torch.where(v > 11, 11.0, torch.round(v) - v))
    weights = torch.arange(1.0, 7.0)
    (out * weights).sum().backward()
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float((expected * weights).sum()) / (6 * 15) ** 0.5, rel=1e-6)
    quantizer = UniformAffine(torch.tensor(0.5), torch.tensor(4), bits=4, signed=False, scheme="asymmetric")
    assert torch.equal(out.detach(), quantizer(x))


def output_error(case: Problem, parameters: Parameters) -> float:
    model = QuantizedModel(case.graph, case.sites, parameters, case.recipe, {}, False)
    simulation, target = model.simulation(integer=False), logits(case)
    with torch.no_grad():
        out = torch.cat([simulation(images) for images in case.pictures()])
    return float((out - target).square().sum() / target.square().sum())


@pytest.mark.parametrize("name", METHODS_HERE)
def test_no_unit_loses_more_than_with_nearest_rounding_and_the_net_loses_less(name: str) -> None:
    case = problem("w3a8", **QUICK)
    before = output_error(case, set_ranges(case, "mse"))
    parameters = METHODS[name](case)
    report = parameters.report[name]
    assert all(entry["after"] <= entry["before"] for entry in report)
    assert sum(len(entry["modules"]) for entry in report) == len(case.sites.weights)
    assert output_error(case, parameters) < 0.9 * before
    nodes = {n.name: n for n in case.graph.graph.nodes}
    for node, codes in parameters.codes.items():
        found = weight_of(case.graph, nodes[node])
        assert found is not None
        quantizer = parameters.weights[node]
        low = torch.floor(found[0] / quantizer.scale.view(-1, *[1] * (found[0].ndim - 1)))
        assert bool(((codes - low >= 0) & (codes - low <= 1) | (codes == -4) | (codes == 3)).all())


def test_qdrop_without_drops_is_brecq() -> None:
    first = METHODS["brecq"](problem("w4a4", **QUICK))
    second = METHODS["qdrop"](problem("w4a4", **QUICK, drop=0.0))
    assert first.codes.keys() == second.codes.keys()
    assert all(torch.equal(codes, second.codes[node]) for node, codes in first.codes.items())
    third = METHODS["qdrop"](problem("w4a4", **QUICK))
    assert any(not torch.equal(codes, third.codes.get(node, codes + 1)) for node, codes in first.codes.items())


def test_a_stopped_run_goes_on_and_ends_where_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "state": str(tmp_path / "state")}
    unbroken = METHODS["qdrop"](problem("w4a4", **{**options, "state": str(tmp_path / "other")}))
    learned: list[str] = []

    class Stops(UnitLearner):
        def run(self, *args: Any) -> tuple[float, float]:
            if len(learned) == 2:
                raise KeyboardInterrupt
            learned.append(self.unit.nodes[0])
            return super().run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(unit_walk, "UnitLearner", Stops)
        with pytest.raises(KeyboardInterrupt):
            METHODS["qdrop"](problem("w4a4", **options))
    assert len(list((tmp_path / "state").glob("unit_*.safetensors"))) == 2
    resumed = METHODS["qdrop"](problem("w4a4", **options))
    assert all(torch.equal(codes, resumed.codes[node]) for node, codes in unbroken.codes.items())
    for value, quantizer in unbroken.activations.items():
        assert torch.equal(quantizer.scale, resumed.activations[value].scale)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="belongs to another recipe or net"):
        METHODS["qdrop"](problem("w3a4", **options))


class Windows(nn.Module):
    """A residual block inside four windows of each picture, which share the first axis with the pictures."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        x = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
        x = x + self.second(nn.functional.gelu(self.first(x)))
        x = x.unflatten(0, (-1, 4)).mean((1, 2))
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("name", METHODS_HERE)
def test_windows_beside_pictures_in_the_first_axis(name: str) -> None:
    """What the last unit reports is what the net computes, so inputs and targets belonged together."""
    case = problem("w3a8", net=Windows, **QUICK)
    parameters = METHODS[name](case)
    report = parameters.report[name]
    assert any(entry["after"] < 0.9 * entry["before"] for entry in report)
    model = QuantizedModel(case.graph, case.sites, parameters, case.recipe, {}, False)
    simulation = model.simulation(integer=False)
    with torch.no_grad():
        errors = [
            float((simulation(x) - case.graph(x)).square().sum() / case.graph(x).square().sum())
            for x in case.pictures()
        ]
    assert sum(errors) / len(errors) == pytest.approx(report[-1]["after"], rel=1e-3)


@pytest.mark.parametrize("name", METHODS_HERE)
def test_a_runtime_computes_what_is_simulated(name: str) -> None:
    model = quantize(Hybrid(), calib=calibration(), input_size=SIDE, method=name, options={**QUICK, "iterations": 5})
    assert verify(model, calibration()).sqnr_db > 40
    for node, codes in model.parameters.codes.items():
        assert torch.equal(model.codes(node), codes)
