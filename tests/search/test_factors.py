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


def test_ranges_that_clip_hopelessly_are_not_tried() -> None:
    tried: list[float] = []

    def errors(f: torch.Tensor) -> torch.Tensor:
        tried.extend(f.flatten().tolist())
        return (f - 0.8) ** 2 + 1e-3

    factors, _ = best_factors(errors, 1)
    brute, _ = best_factors(errors, 1, coarse=1)
    assert torch.equal(factors, brute)
    assert min(tried[: -len(FACTORS)]) > 0.4  # ever narrower, the error has grown eightfold at 0.7


def test_an_error_that_falls_late_is_followed_to_the_end() -> None:
    """Steps wider than the bulk of the values: the error is level for long, and falls where they are resolved."""
    x = torch.cat([0.02 * torch.randn(4000, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0])])

    def errors(f: torch.Tensor) -> torch.Tensor:
        quantizers = [uniform_from_range(-one, one, bits=4, scheme="symmetric", signed=True) for one in f.flatten()]
        return torch.stack([(q(x) - x).square().sum() for q in quantizers])[:, None]

    factors, least = best_factors(errors, 1)
    assert float(factors) < 0.2
    assert float(least) <= 1.01 * float(best_factors(errors, 1, coarse=1)[1])
