"""ERQ on a small net: less error than its base, integers that are exported as they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hybrid import SIDE, Hybrid, logits, problem
from qhyvit.data.views import with_views
from qhyvit.errors import RecipeError
from qhyvit.graph.ops import weight_of
from qhyvit.methods import METHODS, Problem
from qhyvit.methods.erq import HELD_OUT
from qhyvit.pipeline import quantize
from qhyvit.quantized import Parameters, QuantizedModel
from qhyvit.search.ridge import Moments, choose_rho, moments
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


@pytest.mark.parametrize("views", [1, 3])
def test_layers_with_fewer_positions_than_asked_keep_their_weights(views: int) -> None:
    """Whatever the views: crops of a picture are no new pictures."""
    case = problem("w4a4", base="mse", views=views, rows=1)
    nodes = {n.name: n for n in case.graph.graph.nodes}
    few = set()
    for site in case.sites.weights:
        node = nodes[site.node]
        positions = node.meta["shape"][1:-1] if site.kind == "linear" else node.meta["shape"][2:]
        if case.picture_count * math.prod(positions) < math.prod(site.shape[1:]):
            few.add(site.node)
    assert few  # the head
    assert METHODS["erq"](case).codes.keys() == {s.node for s in case.sites.weights} - few


def test_float_activations_and_fine_weights_leave_the_net_alone() -> None:
    case = problem("w16a16", base="mse")
    assert output_error(case, METHODS["erq"](case)) < 1e-6


@pytest.mark.parametrize("base", ["mse", "repqvit", "qhyvit"])
def test_a_runtime_computes_what_is_simulated(base: str) -> None:
    model = quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="erq", options={"base": base})
    assert verify(model, calibration()).sqnr_db > 40
    for node, codes in model.parameters.codes.items():
        assert torch.equal(model.codes(node), codes)


def test_all_views_of_the_held_out_pictures_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case, found = problem("w4a4", base="mse", views=3), []

    def watch(fit: Moments, held_out: Moments | None, candidates: tuple[float, ...]) -> float | None:
        found.append(held_out)
        return choose_rho(fit, held_out, candidates)

    batches = list(torch.cat(list(case.pictures())).split(1))
    case.pictures = lambda: iter(batches)
    monkeypatch.setattr("qhyvit.methods.erq.choose_rho", watch)
    parameters = METHODS["erq"](case)
    stem = next(n for n in case.graph.graph.nodes if n.name == case.sites.weights[0].node)
    weight, _ = weight_of(case.graph, stem)  # type: ignore[misc]
    quantizer = parameters.activations[stem.args[0].name]
    views = with_views(batches, 3, case.recipe.seed)[HELD_OUT - 1 :: HELD_OUT]
    expected = [moments(stem, weight, x, quantizer(x)).gram for pictures in views for x in pictures]
    torch.testing.assert_close(found[0].gram, sum(expected))


@pytest.mark.parametrize("options", [{"base": "kl"}, {"rho": [0]}, {"ridge": 1}, {"views": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="recipe key 'options"):
        METHODS["erq"](problem(**options))
