"""Softmax in integers against exp and softmax."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qhyvit.operators import OPERATORS, IntegerSoftmax

KINDS: list[Any] = ["polynomial", "linear"]


def build(scale: float = 0.01, bits: int = 8, exponential: Any = "polynomial") -> IntegerSoftmax:
    return IntegerSoftmax(torch.tensor(scale), bits=bits, axis=-1, exponential=exponential)


def scores(scale: float, seed: int = 0, deviation: float = 2.0) -> Tensor:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed)) * deviation
    return torch.round(x / scale) * scale


@pytest.mark.parametrize(("kind", "low", "high"), [("polynomial", -0.0033, 0.0022), ("linear", -0.053, 0.021)])
def test_error_of_the_exponential(kind: Any, low: float, high: float) -> None:
    """Relative to exp, both up to one common factor, as only ratios count; the bounds are tight."""
    scale = 1e-4
    operator = build(scale, exponential=kind)
    integers = torch.arange(0, -6931, -1).double()  # down to -ln 2
    found = operator.exponentials(integers)
    unit = 2.0**30 / (0.08947606 * 8 * scale if kind == "linear" else 0.35815147 * scale**2)
    error = found / unit / torch.exp(integers * scale) - 1
    assert low * 1.03 <= float(error.min()) <= low * 0.9
    assert high * 0.9 <= float(error.max()) <= high * 1.04


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 500), st.floats(0.5, 6))
def test_probabilities_lie_within_a_factor_and_zero_only_beyond_the_codes(seed: int, deviation: float) -> None:
    """Rounding 1 / p to a whole number and then to a power of two: 2.5 → 3 → 4 below, 1.5 → 1 above."""
    scale = 1e-4  # coarser ones add the error of ln 2 in units of the scale
    x = scores(scale, seed, deviation)
    operator = build(scale, bits=4)
    found, true = operator(x).double(), torch.softmax(x.double(), -1)
    ratio = (found / true)[found > 0]
    assert float(ratio.min()) > 0.62
    assert float(ratio.max()) <= 1.5 * 1.0055  # the error of the polynomial
    assert torch.equal(found == 0, operator.exponents(x) >= 16)
    assert bool((true[found == 0] < 2**-15).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_shift_of_the_scores_changes_nothing(kind: Any) -> None:
    x = scores(0.125)
    operator = build(0.125, exponential=kind)
    assert torch.equal(operator(x), operator(x + 7 * 0.125))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_sum_to_one_within_the_rounding_of_the_exponents(kind: Any) -> None:
    total = build(0.01, exponential=kind)(scores(0.01)).sum(-1)
    assert float(total.min()) > 1 / 1.5
    assert float(total.max()) < 1.5


def test_one_score_far_above_the_others_takes_all() -> None:
    x = torch.tensor([[0.0, -100.0, -50.0]])
    assert build(0.1)(x)[0, 0] == 1
    assert build(0.1, bits=4)(x).tolist() == [[1, 0, 0]]


def test_exponents_are_rounded_between_the_powers_as_published() -> None:
    """1 / p = 3 is half-way from 2 to 4 and goes up: three equal scores are a quarter each."""
    assert build()(torch.zeros(1, 3)).tolist() == [[0.25, 0.25, 0.25]]
    assert build()(torch.zeros(1, 2)).tolist() == [[0.5, 0.5]]
    assert build()(torch.zeros(1, 5)).tolist() == [[0.25] * 5]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_few_codes_still_give_probabilities(kind: Any) -> None:
    """A scale above 2.7, where the integer constants would be 0."""
    found = build(3.0, exponential=kind)(torch.tensor([[0.0, -3.0, -6.0]]))
    assert bool(found.isfinite().all())
    assert found[0, 0] == found.max() == 0.5


def test_it_comes_back_from_its_specification() -> None:
    operator = build(0.03, 4, "linear")
    spec = json.loads(json.dumps(operator.spec()))
    again = OPERATORS[spec["kind"]].from_spec(spec, **operator.state_dict())
    assert torch.equal(again(scores(0.03)), operator(scores(0.03)))
    assert math.isclose(float(again.scale), 0.03, rel_tol=1e-6)


def test_an_unknown_exponential_is_refused() -> None:
    with pytest.raises(ValueError, match="polynomial, linear"):
        build(exponential="cubic")
