"""Compensated rounding against nearest rounding and against all roundings of a small row."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from qhyvit.search.rounding import Grid, compensated, flip, quadratic


def case(groups: int = 2, rows: int = 6, inputs: int = 24) -> tuple[Tensor, Tensor, Grid]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(groups, rows, inputs, dtype=torch.float64, generator=generator)
    x = torch.randn(groups, 200, 4, dtype=torch.float64, generator=generator) @ torch.randn(
        groups, 4, inputs, dtype=torch.float64, generator=generator
    )
    x = x + 0.2 * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    scale = weight.abs().amax(-1, keepdim=True) / 7.5
    return weight, x.transpose(1, 2) @ x, Grid(scale, torch.zeros_like(scale), -8, 7)


def error(codes: Tensor, weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    return quadratic(grid.value(codes) - weight, gram)


def test_codes_are_integers_in_range_and_no_row_is_worse_than_nearest() -> None:
    weight, gram, grid = case()
    codes = compensated(weight, gram, grid)
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) >= -8
    assert float(codes.max()) <= 7
    nearest = error(grid.nearest(weight), weight, gram, grid)
    found = error(codes, weight, gram, grid)
    assert bool((found <= nearest * (1 + 1e-9)).all())
    assert float(found.sum()) < 0.3 * float(nearest.sum())


def test_independent_inputs_are_rounded_to_nearest() -> None:
    weight, _, grid = case()
    gram = torch.diag_embed(torch.rand(2, 24, dtype=torch.float64) + 0.5)
    assert torch.equal(compensated(weight, gram, grid), grid.nearest(weight))


def test_small_rows_come_close_to_the_best_of_all_roundings_up_or_down() -> None:
    """Some rows even beat it, since a code may move further than to a neighbour."""
    weight, gram, grid = case(1, 32, 8)
    low = torch.floor(weight / grid.scale)
    every = torch.stack([low + torch.tensor(bits, dtype=torch.float64) for bits in product((0, 1), repeat=8)])
    best = torch.stack([error(c.clamp(-8, 7), weight, gram, grid) for c in every]).amin(0)
    nearest, found = (error(c, weight, gram, grid) for c in (grid.nearest(weight), compensated(weight, gram, grid)))
    assert float((found - best).sum()) <= 0.25 * float((nearest - best).sum())


def test_flips_lower_the_error_and_stay_with_neighbours() -> None:
    weight, gram, grid = case()
    nearest = grid.nearest(weight)
    codes = flip(nearest, weight, gram, grid, 100, neighbours=True)
    inside = (weight / grid.scale > -8) & (weight / grid.scale < 7)
    assert bool(((codes - weight / grid.scale).abs()[inside] <= 1 + 1e-9).all())
    before, after = (error(c, weight, gram, grid) for c in (nearest, codes))
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.6 * float(before.sum())
    assert torch.equal(flip(nearest, weight, gram, grid, 0, neighbours=True), nearest)
