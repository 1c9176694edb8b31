"""The ridge of ERQ against least squares by another way, and its limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qhyvit.graph.ops import aten
from qhyvit.search.ridge import Moments, choose_rho, moments, solve


def layer(kind: str) -> tuple[fx.Node, Tensor, Tensor]:
    """A node, its weight and an input."""
    generator = torch.Generator().manual_seed(0)
    graph = fx.Graph()
    x, w, b = graph.placeholder("x"), graph.get_attr("w"), graph.get_attr("b")
    shapes = {
        "linear": ((5, 6), (40, 6)),
        "conv": ((4, 3, 3, 3), (3, 3, 8, 8)),
        "depthwise": ((6, 1, 3, 3), (3, 6, 9, 9)),
        "grouped": ((4, 3, 1, 1), (2, 6, 6, 6)),
    }
    weight_shape, input_shape = shapes[kind]
    if kind == "linear":
        node = graph.call_function(aten.linear.default, (x, w, b))
    else:
        groups = input_shape[1] // weight_shape[1]
        node = graph.call_function(aten.conv2d.default, (x, w, b, [2, 2], [1, 1], [1, 1], groups))
    node.meta["shape"] = (1, 1) if kind == "linear" else (1, 1, 1, 1)
    weight = torch.randn(weight_shape, generator=generator)
    return node, weight, torch.randn(input_shape, generator=generator)


def outputs(node: fx.Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if node.target == aten.linear.default:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, *node.args[3:])  # type: ignore[arg-type]


KINDS = ["linear", "conv", "depthwise", "grouped"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_error_leaves_the_weights_as_they_are(kind: str) -> None:
    node, weight, x = layer(kind)
    m = moments(node, weight, x, x)
    assert float(solve(m, 1e-3).abs().max()) == 0.0
    assert float(m.energy.sum()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_changed_weights_is_that_of_running_the_layer(kind: str) -> None:
    node, weight, x = layer(kind)
    coded = torch.round(x * 2) / 2
    m = moments(node, weight, x, coded)
    change = solve(m, 1e-2)
    new = weight.double() + change[..., :-1].reshape(weight.shape)
    bias = change[..., -1].flatten()
    missed = outputs(node, x.double(), weight.double(), torch.zeros_like(bias)) - outputs(
        node, coded.double(), new, bias
    )
    assert float(m.error(change).sum()) == pytest.approx(float(missed.square().sum()), rel=1e-9)
    assert float(m.error(change).sum()) < 0.9 * float(m.energy.sum())


def test_without_ridge_it_is_least_squares() -> None:
    node, weight, x = layer("linear")
    coded = torch.round(x)
    change = solve(moments(node, weight, x, coded), 1e-12)[0]
    rows = torch.cat([coded, torch.ones(len(coded), 1)], 1).double()
    expected = torch.linalg.lstsq(rows, (x - coded).double() @ weight.double().t()).solution.t()
    assert torch.allclose(change, expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_calibration_error_never_rises_as_the_ridge_shrinks(kind: str) -> None:
    node, weight, x = layer(kind)
    m = moments(node, weight, x, torch.round(x))
    errors = [float(m.error(solve(m, 10.0**-k)).sum()) for k in range(-3, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < float(m.energy.sum())


def test_the_ridge_is_chosen_by_pictures_that_were_not_fitted() -> None:
    node, weight, x = layer("linear")
    parts = [moments(node, weight, part, torch.round(part)) for part in x.split(10)]
    fit, held_out = parts[0], parts[1] + parts[2] + parts[3]
    candidates = (1e-6, 1e-3, 1e-1, 1e1)
    rho = choose_rho(fit, held_out, candidates)
    least = min(float(held_out.error(solve(fit, c)).sum()) for c in candidates)
    assert rho is None or float(held_out.error(solve(fit, rho)).sum()) == least
    opposite = Moments(held_out.gram, -held_out.cross, held_out.energy, held_out.rows)
    assert choose_rho(held_out, opposite, candidates) is None  # what helps here hurts there
    assert choose_rho(fit, None, candidates) == 1e1
