"""The search of method qhyvit on a small net."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import SIDE, Tiny

from qhyvit.calibration.samples import LayerSample
from qhyvit.errors import RecipeError
from qhyvit.graph.capture import capture
from qhyvit.graph.sites import Sites, place
from qhyvit.methods.base import Problem
from qhyvit.methods.qhyvit import Options, _layer_errors, qhyvit, read_options
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import Parameters
from qhyvit.recipe import Recipe
from qhyvit.search.gather import gather


def problem(bits: str = "w4a4", **options: object) -> Problem:
    torch.manual_seed(0)
    images = torch.randn(8, 3, SIDE, SIDE)
    graph = capture(Tiny(), images)

    def find(captured: torch.fx.GraphModule) -> Sites:
        return place(captured, quantized_outputs=frozenset({"conv"}))

    recipe = Recipe(bits=bits, method="qhyvit", options={"balance": False, "gradient": "none", **options})
    return Problem(graph, find(graph), recipe, lambda: iter(images.split(4)), len(images), find)


def layer_errors(case: Problem, parameters: Parameters) -> dict[str, float]:
    """Weighted error of each sampled layer with its own quantized weight and input."""
    samples = gather(case, "none", 1024)
    found = {}
    for name, error in _layer_errors(case, samples).items():
        source = next((s.value for s in case.sites.activations if name in s.readers), None)
        quantizer = parameters.activations[source] if source else None
        weight = error.grouped(parameters.weights[name](error.weight.transpose(1, 2).reshape(error.shape)))
        found[name] = float(error(error.quantized_input(quantizer), weight).sum())
    return found


def test_no_layer_is_worse_than_where_the_search_began() -> None:
    case = problem()
    before, after = layer_errors(case, set_ranges(case, "mse")), layer_errors(case, qhyvit(case))
    assert before.keys() == after.keys()
    assert all(after[name] <= before[name] * 1.0001 for name in before)
    assert sum(after.values()) < 0.95 * sum(before.values())


def test_coarse_to_fine_costs_at_most_one_percent_against_brute_force() -> None:
    fast, brute = problem(rounds=1), problem(rounds=1, coarse=1)
    quick, slow = layer_errors(fast, qhyvit(fast)), layer_errors(brute, qhyvit(brute))
    for name, error in quick.items():
        assert error <= 1.01 * slow[name], name


@pytest.mark.parametrize("source", ["default_quant", "fisher", "none"])
def test_each_gradient_source_weights_the_samples(source: str) -> None:
    case = problem("w8a8")
    samples = gather(case, source, 256)  # type: ignore[arg-type]
    layers = [s for s in samples.values() if isinstance(s, LayerSample)]
    assert len(layers) == len(case.sites.weights)
    for sample in layers:
        assert torch.isclose(sample.weight.mean(), torch.tensor(1.0), atol=1e-4)
        assert (sample.weight.std() > 0.05) or source == "none"


def test_the_same_seed_gives_the_same_choice() -> None:
    first, second = qhyvit(problem(gradient="fisher")), qhyvit(problem(gradient="fisher"))
    assert all(torch.equal(q.scale, second.weights[n].scale) for n, q in first.weights.items())
    assert all(torch.equal(q.scale, second.activations[n].scale) for n, q in first.activations.items())


def test_options_are_checked_by_name() -> None:
    assert read_options({}) == Options()
    with pytest.raises(RecipeError, match=r"options\.gradiend"):
        read_options({"gradiend": "fisher"})
    with pytest.raises(RecipeError, match=r"options\.gradient.*allowed"):
        read_options({"gradient": "magic"})
