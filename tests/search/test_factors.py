"""Coarse-to-fine search against brute force."""

from __future__ import annotations

import torch

from qhyvit.quantizers.uniform import uniform_from_range
from qhyvit.search.factors import FACTORS, best_factors


def test_the_candidates_are_those_of_the_paper() -> None:
    assert len(FACTORS) == 100
    assert torch.isclose(FACTORS[0], torch.tensor(0.01))
    assert torch.isclose(FACTORS[-1], torch.tensor(1.2))


def test_it_finds_the_minimum_of_separable_channels_each_for_itself() -> None:
    centres = torch.tensor([0.05, 0.4, 0.77, 1.2])
    factors, errors = best_factors(lambda f: (f - centres) ** 2, 4)
    expected, least = best_factors(lambda f: (f - centres) ** 2, 4, coarse=1)
    assert torch.equal(factors, expected)
    assert torch.equal(errors, least)


def test_its_choice_costs_at_most_one_percent_on_weight_like_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in (4, 6, 8):
        weight = torch.randn(64, 96, generator=generator) * torch.rand(64, 1, generator=generator)
        x = torch.randn(512, 96, generator=generator)
        low, high = weight.amin(1), weight.amax(1)

        def errors(f: torch.Tensor, bits=bits, weight=weight, x=x, low=low, high=high) -> torch.Tensor:  # type: ignore[no-untyped-def]
            found = []
            for one in f:
                q = uniform_from_range(one * low, one * high, bits=bits, scheme="symmetric", signed=True, axis=0)
                found.append((x @ (q(weight) - weight).T).square().sum(0))
            return torch.stack(found)

        _, fast = best_factors(errors, 64)
        _, brute = best_factors(errors, 64, coarse=1)
        assert float(fast.sum()) <= 1.01 * float(brute.sum())
