"""EasyQuant: cosine search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid import problem
from qhyvit.calibration.samples import LayerSample
from qhyvit.errors import RecipeError
from qhyvit.methods.base import Problem, with_settings
from qhyvit.methods.easyquant import easyquant
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import Parameters
from qhyvit.search.cosine import CosineError
from qhyvit.search.scales import best_weight_step, symmetric_weight


def minmax(case: Problem) -> Parameters:
    settings = with_settings(
        case,
        weights={"granularity": "per-channel", "scheme": "symmetric"},
        activations={"granularity": "per-tensor", "scheme": "symmetric"},
    )
    return set_ranges(settings, "minmax")


def gaussian_layer(scale: float = 1.0, positions: int = 400) -> tuple[CosineError, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(positions, 1, 512, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 512, generator=generator, dtype=torch.float64) * scale
    y = (x @ weight.t()).view(positions, 1, 5)
    return CosineError(LayerSample(x, y, torch.ones_like(y)), weight, None, torch.arange(512)[None]), weight


def test_factor_one_alone_is_min_max() -> None:
    case = problem("w4a4", alpha=1.0, beta=1.0, candidates=1)
    found, expected = easyquant(case), minmax(case)
    for name, quantizer in expected.weights.items():
        assert torch.equal(found.weights[name].scale, quantizer.scale)
    for name in expected.activations:
        assert torch.equal(found.uniform(name).scale, expected.uniform(name).scale)
        assert int(found.uniform(name).zero_point) == 8  # symmetric


def test_the_chosen_cosine_is_no_less_than_that_of_any_candidate() -> None:
    error, weight = gaussian_layer()
    factors = torch.linspace(0.5, 2, 100)

    def errors(quantizer: nn.Module) -> Tensor:
        return error(error.x, error.grouped(quantizer(weight)))

    chosen = best_weight_step(weight, torch.arange(5), factors, 4, errors)
    base = symmetric_weight(weight, torch.arange(5), 4)
    for channel in range(5):  # brute force, channel by channel, with the cosine written out
        y = error.x[0] @ weight[channel]
        best = -1.0
        for f in factors:
            step = base.scale[channel] * f
            coded = (torch.round(weight[channel] / step).clamp(-8, 7) * step) @ error.x[0].t()
            best = max(best, float(y @ coded / y.norm() / coded.norm()))
        coded = error.x[0] @ chosen(weight)[channel]
        assert float(y @ coded / y.norm() / coded.norm()) == pytest.approx(best, abs=1e-9)
    assert bool((chosen.scale < base.scale).all())  # four bits of a Gaussian are better clipped


def test_a_common_factor_of_the_weight_changes_no_choice() -> None:
    found, factors = [], torch.linspace(0.5, 2, 100)
    for scale in (1.0, 10.0):
        error, weight = gaussian_layer(scale)
        chosen = best_weight_step(
            weight, torch.arange(5), factors, 4, lambda q, e=error, w=weight: e(e.x, e.grouped(q(w)))
        )
        found.append(chosen.scale / symmetric_weight(weight, torch.arange(5), 4).scale)
    assert torch.allclose(found[0], found[1], rtol=1e-5)


def test_the_cosine_of_zeros_exists() -> None:
    zero = torch.zeros(10, 1, 4)
    error = CosineError(LayerSample(zero, zero[..., :2], zero[..., :2]), torch.zeros(2, 4), None, torch.arange(4)[None])
    weight = torch.zeros(1, 4, 2)
    assert bool(error(error.x, weight).abs().max() < 1e-6)
    assert float(error.whole(error.x, weight)) == pytest.approx(0, abs=1e-6)


def test_values_that_no_layer_reads_are_named() -> None:
    case = problem("w8a8", target="onnxruntime", candidates=4, rounds=1)
    assert any("keep their min-max step" in note for note in easyquant(case).notes)


@pytest.mark.parametrize(("options", "message"), [({"beta": 0}, r"options\.beta"), ({"bta": 1}, "did you mean 'beta'")])
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        easyquant(problem(**options))
