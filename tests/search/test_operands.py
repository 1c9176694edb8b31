"""What the search of one operand leaves out, against all that it could try."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qhyvit.quantizers.uniform import Scheme, uniform_from_range
from qhyvit.search.candidates import Candidates
from qhyvit.search.factors import FACTORS
from qhyvit.search.operands import Choice, Range, Space, search

BOTH: tuple[Scheme, ...] = ("symmetric", "asymmetric")


def values(kind: str) -> Tensor:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    return {"relu": x.relu(), "silu": torch.nn.functional.silu(3 * x), "level": x, "negative": -x.relu()}[kind]


def searched(x: Tensor, bits: int, **options: Any) -> tuple[Choice, list[Candidates]]:
    """The choice of least squared error on x, and all that was tried."""
    tried: list[Candidates] = []

    def evaluate(candidates: Candidates) -> Tensor:
        tried.append(candidates)
        return (candidates(x) - x).square().sum(1, keepdim=True)

    incumbent = uniform_from_range(x.min(), x.max(), bits=bits, scheme="asymmetric", signed=False)
    start = Choice(incumbent, float((incumbent(x) - x).square().sum()))
    space = Space(bits, False, BOTH, ("per-tensor",), **{"one_sided": True, **options})
    found = search(space, Range(x.min(), x.max()), evaluate, start, separable=False)
    return found, tried


def symmetric(x: Tensor, bits: int) -> float:
    """Least squared error of all symmetric candidates."""
    top = FACTORS * x.abs().max()
    quantizers = [uniform_from_range(-t, t, bits=bits, scheme="symmetric", signed=False) for t in top]
    return min(float((q(x) - x).square().sum()) for q in quantizers)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["relu", "silu", "negative", "level"])
def test_no_symmetric_candidate_is_better_than_the_choice(kind: str, bits: int) -> None:
    x = values(kind)
    found, tried = searched(x, bits)
    assert found.error <= symmetric(x, bits) * 1.01
    assert ("symmetric" in {t.scheme for t in tried}) == (kind == "level")


def test_where_no_end_moves_alone_skewed_values_are_tried_symmetrically_too() -> None:
    _, tried = searched(values("silu"), 4, one_sided=False)
    assert {t.scheme for t in tried} == set(BOTH)


@pytest.mark.parametrize(("kind", "walks"), [("relu", 2), ("negative", 2), ("silu", 3)])
def test_an_end_at_zero_is_not_shrunk(kind: str, walks: int) -> None:
    _, tried = searched(values(kind), 8, coarse=1)  # a walk is one call
    assert sum(len(t) == len(FACTORS) for t in tried) == len(tried) == walks
