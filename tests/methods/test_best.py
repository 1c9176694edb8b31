"""The parts together lose less than each by itself, and are exported as they are."""

from __future__ import annotations

import pytest
import torch

from hybrid import SIDE, Hybrid
from qhyvit.errors import RecipeError
from qhyvit.methods import METHODS
from qhyvit.methods import best as best_module
from qhyvit.pipeline import quantize
from qhyvit.verification import verify
from tiny import calibration


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def error(method: str, bits: str) -> float:
    """Squared error of the logits on pictures that were not calibrated on, as a share of their square."""
    model = quantize(Hybrid(), calib=pictures(0), input_size=SIDE, method=method, bits=bits)
    with torch.no_grad():
        wanted, found = model.graph(pictures(1)), model.simulation()(pictures(1))
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_it_loses_less_than_its_parts() -> None:
    loss = {method: error(method, "w4a4") for method in ("mse", "qhyvit", "best")}
    assert loss["best"] < loss["qhyvit"] < loss["mse"]


def test_a_runtime_computes_what_is_simulated() -> None:
    model = quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="best", bits="w8a8")
    assert verify(model, calibration()).sqnr_db > 40
    assert model.parameters.codes
    assert model.parameters.correct_biases
    assert {"erq", "overflow"} <= set(model.parameters.report)


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="recipe key 'options"):
        quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="best", options={"base": "kl"})
    assert "qhyvit" in METHODS["best"].description


@pytest.mark.parametrize(
    ("plain", "refitted", "kept"), [(3.0, 0.95, "qhyvit"), (3.0, 0.9, "mse"), (5.0, 0.1, "qhyvit")]
)
def test_ranges_of_mse_are_kept_only_where_clearly_closer_and_not_far_off_before(
    monkeypatch: pytest.MonkeyPatch, plain: float, refitted: float, kept: str
) -> None:
    errors = iter([1.0, 1.0, plain, refitted])
    monkeypatch.setattr(best_module, "_error", lambda problem, parameters: next(errors))
    model = quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="best")
    assert any(f"ranges of {kept} kept" in note for note in model.parameters.notes)
    assert ("overflow" in model.parameters.report) == (kept == "qhyvit")  # only qhyvit counts them
    assert verify(model, calibration()).sqnr_db > 40  # graph, sites and parameters are those of one attempt
