"""The progressive search against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qhyvit.quantizers.uniform import fake_quantize
from qhyvit.search.fpcs import fpcs, zero_points_around


def squared(x: Tensor, bits: int = 4):  # type: ignore[no-untyped-def]
    """Error of each row of x (C, n)."""
    top = 2**bits - 1

    def errors(scale: Tensor, zero: Tensor) -> Tensor:
        coded = fake_quantize(x, scale[:, None], zero[:, None].to(x.dtype), 0, top)
        return (coded - x).square().sum(1)

    return errors


@pytest.mark.parametrize("seed", range(4))
def test_within_one_percent_of_a_hundred_thousand_points_and_never_above_the_first_grid(seed: int) -> None:
    x = torch.randn(1, 400, generator=torch.Generator().manual_seed(seed)).double() ** 3 * 0.3 + 0.2
    largest, zeros = (x.max() - x.min()).view(1) / 15, torch.arange(16).view(-1, 1)
    smallest = (x.quantile(0.9) - x.quantile(0.1)).view(1) / 15
    errors = squared(x)
    _, _, found = fpcs(errors, smallest, largest, zeros)
    grid = torch.lerp(smallest, largest, torch.linspace(0, 1, 8, dtype=x.dtype)[:, None])
    first = min(float(errors(s, z)) for s in grid for z in zeros)
    assert float(found) <= first
    scales = torch.linspace(float(smallest), float(largest), 6250, dtype=torch.float64)
    brute = min(float(errors_of_all(x, scales, z).min()) for z in range(16))
    assert float(found) <= 1.01 * brute


def errors_of_all(x: Tensor, scales: Tensor, zero: int) -> Tensor:
    coded = (torch.round(x / scales[:, None]) + zero).clamp(0, 15) - zero
    return (coded * scales[:, None] - x).square().sum(1)


def test_channels_are_searched_each_by_itself() -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(7)) * torch.tensor([[0.1], [1.0], [20.0]])
    largest = (x.amax(1) - x.amin(1)) / 15
    zeros = zero_points_around(torch.full((3,), 8, dtype=torch.int32), 8, 0, 15)
    together = fpcs(squared(x), largest / 4, largest, zeros)
    for channel in range(3):
        only = slice(channel, channel + 1)
        alone = fpcs(squared(x[only]), largest[only] / 4, largest[only], zeros[:, only])
        assert torch.equal(alone[0], together[0][only])
        assert torch.equal(alone[1], together[1][only])


def test_zero_points_stay_among_the_codes() -> None:
    centre = torch.tensor([0, 8, 15], dtype=torch.int32)
    found = zero_points_around(centre, 4, 0, 15)
    assert found.t().tolist() == [[0, 1, 2, 3], [6, 7, 8, 9], [12, 13, 14, 15]]
    assert zero_points_around(centre, 1, 0, 15).tolist() == [[0, 8, 15]]
