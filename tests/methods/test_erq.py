"""ERQ on a small net: less error than its base, integers that are exported as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid import SIDE, Hybrid, logits, problem
from qhyvit.errors import RecipeError
from qhyvit.methods import METHODS, Problem
from qhyvit.pipeline import quantize
from qhyvit.quantized import Parameters, QuantizedModel
from qhyvit.verification import verify
from tiny import calibration


def output_error(case: Problem, parameters: Parameters) -> float:
    """Squared error of the logits on the calibration pictures, as a share of their square."""
    model = QuantizedModel(case.graph, case.sites, parameters, case.recipe, {}, False)
    simulation, target = model.simulation(integer=False), logits(case)
    with torch.no_grad():
        found = torch.cat([simulation(images) for images in case.pictures()])
    return float((found - target).square().sum() / target.square().sum())


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("weights", ["compensate", "nearest"])
def test_the_net_loses_less_than_with_the_base_alone(inputs: str, weights: str) -> None:
    case = problem("w4a4", base="mse", inputs=inputs, weights=weights)
    before = output_error(case, METHODS["mse"](case))
    after = output_error(case, METHODS["erq"](case))
    assert after < (0.7 if inputs == "quantized" else 0.95) * before


def test_every_layer_has_codes_of_its_own_within_its_width() -> None:
    case = problem("w4a4", base="mse")
    parameters = METHODS["erq"](case)
    assert set(parameters.codes) == {s.node for s in case.sites.weights} == set(parameters.biases)
    for site in case.sites.weights:
        codes = parameters.codes[site.node]
        assert codes.shape == site.shape
        assert codes.dtype == torch.int32
        assert int(codes.min()) >= -8
        assert int(codes.max()) <= 7
    report = parameters.report["erq"]
    assert [entry["module"] for entry in report] == [s.module for s in case.sites.weights]
    assert sum(entry["after"] < entry["before"] for entry in report) >= len(report) - 2


def test_float_activations_and_fine_weights_leave_the_net_alone() -> None:
    case = problem("w16a16", base="mse")
    assert output_error(case, METHODS["erq"](case)) < 1e-6


@pytest.mark.parametrize("base", ["mse", "repqvit", "qhyvit"])
def test_a_runtime_computes_what_is_simulated(base: str) -> None:
    model = quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="erq", options={"base": base})
    assert verify(model, calibration()).sqnr_db > 40
    for node, codes in model.parameters.codes.items():
        assert torch.equal(model.codes(node), codes)


@pytest.mark.parametrize("options", [{"base": "kl"}, {"rho": [0]}, {"ridge": 1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="recipe key 'options"):
        METHODS["erq"](problem(**options))
