"""The parts together lose less than each by itself, and are exported as they are."""

from __future__ import annotations

import pytest
import torch

from hybrid import SIDE, Hybrid, problem
from qhyvit.errors import RecipeError
from qhyvit.methods import METHODS
from qhyvit.methods import best as best_module
from qhyvit.pipeline import quantize
from qhyvit.verification import verify
from quick import captured_once  # noqa: F401
from tiny import calibration


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def error(method: str, bits: str, seed: int) -> float:
    """Squared error of the logits on pictures that were not calibrated on, as a share of their square."""
    model = quantize(Hybrid(), calib=pictures(seed), input_size=SIDE, method=method, bits=bits)
    with torch.no_grad():
        wanted, found = model.graph(pictures(seed + 1)), model.simulation()(pictures(seed + 1))
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.slow
def test_it_loses_less_than_its_parts() -> None:
    loss = {method: sum(error(method, "w4a4", seed) for seed in (0, 2, 4)) for method in ("mse", "qhyvit", "best")}
    assert loss["best"] < loss["qhyvit"] < loss["mse"]


def test_a_runtime_computes_what_is_simulated() -> None:
    model = quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="best", bits="w8a8")
    assert verify(model, calibration()).sqnr_db > 40
    assert model.parameters.codes
    assert model.parameters.correct_biases
    assert "erq" in model.parameters.report


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="recipe key 'options"):
        quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="best", options={"base": "kl"})
    assert "qhyvit" in METHODS["best"].description


@pytest.mark.parametrize(("error_of_mse", "kept"), [(0.95, "qhyvit"), (0.9, "mse")])
def test_ranges_of_mse_are_kept_only_where_clearly_closer(
    monkeypatch: pytest.MonkeyPatch, error_of_mse: float, kept: str
) -> None:
    errors = iter([1.0, error_of_mse])
    monkeypatch.setattr(best_module, "_error", lambda problem, parameters: next(errors))
    model = quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="best")
    assert any(f"ranges of {kept} kept" in note for note in model.parameters.notes)
    assert ("overflow" in model.parameters.report) == (kept == "qhyvit")  # only qhyvit counts them
    assert verify(model, calibration()).sqnr_db > 40  # graph, sites and parameters are those of one attempt


def test_it_judges_by_what_the_target_computes() -> None:
    """Its decibels are those of rounded biases, which here differ by 0.2 dB from those of float ones."""
    model = quantize(Hybrid(), calib=pictures(0), input_size=SIDE, method="best", bits="w4a4")
    with torch.no_grad():
        wanted, found = model.graph(pictures(0)), model.simulation()(pictures(0))
    decibels = 10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum())
    assert f"ranges of qhyvit kept; on the calibration pictures qhyvit {decibels:.1f} dB" in model.parameters.notes[-1]


@pytest.mark.parametrize(
    ("count", "side", "views"), [(32, 64, 8), (8, 64, 8), (64, 64, 4), (500, 64, 4), (32, 256, 1), (1, 2048, 1)]
)
def test_small_pictures_are_shown_in_more_views_as_far_as_memory_goes(count: int, side: int, views: int) -> None:
    case = problem("w8a8")
    case.pictures, case.picture_count = lambda: iter([torch.zeros(1, 3, side, side)]), count
    assert best_module._views(case) == views
