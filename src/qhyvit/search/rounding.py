"""Rounding of a layer's weights that lets later columns make up for earlier ones (ERQ's Wqer, arXiv 2407.06794).

The error of a row is e H eᵀ, e its integers' values minus its float weights, H the inputs' Gram matrix plus the ridge.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Grid:
    """Integers of G groups of O rows each: code c stands for s·(c - z).

    Args:
        scale: (G, O, 1).
        zero_point: (G, O, 1).
        low: smallest code.
        high: largest code.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, low: int, high: int) -> None:
        self.scale, self.zero_point, self.low, self.high = scale, zero_point, low, high

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes (G, O, K) nearest to weights, as floats."""
        return torch.round(weight / self.scale + self.zero_point).clamp_(self.low, self.high)

    def value(self, codes: Tensor) -> Tensor:
        """Weights (G, O, K) that codes stand for."""
        return (codes - self.zero_point) * self.scale


def quadratic(error: Tensor, gram: Tensor) -> Tensor:
    """e H eᵀ of each row (G, O)."""
    return ((error @ gram) * error).sum(-1)


def flip(codes: Tensor, weight: Tensor, gram: Tensor, grid: Grid, steps: int, *, neighbours: bool) -> Tensor:
    """Change one code of each row by one, where that lowers its error most, and again, `steps` times at most.

    Args:
        codes: (G, O, K) to begin with.
        weight: (G, O, K) what they stand for.
        gram: (G, K, K).
        grid: the codes' meaning.
        steps: changes of a row at most.
        neighbours: only to the weight's other neighbour, as ERQ does.

    Returns:
        Codes whose error is nowhere higher.
    """
    codes = codes.clone()
    error = grid.value(codes) - weight
    slope, squares = 2 * error @ gram, gram.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
    groups = torch.arange(len(codes)).unsqueeze(1)
    for _ in range(steps):
        step = -torch.sign(slope)
        gain = squares * grid.scale.square() - slope.abs() * grid.scale
        moved = codes + step
        allowed = (moved >= grid.low) & (moved <= grid.high)
        if neighbours:
            allowed &= (error + step * grid.scale).abs() <= grid.scale
        best, column = gain.masked_fill(~allowed, torch.inf).min(-1, keepdim=True)
        change = torch.where(best < -1e-12 * squares.amax(), step.gather(-1, column), 0.0)
        if not bool(change.any()):
            break
        codes.scatter_add_(-1, column, change)
        error.scatter_add_(-1, column, change * grid.scale)
        slope += 2 * change * grid.scale * gram[groups, column.squeeze(-1)]
    return codes


def compensated(weight: Tensor, gram: Tensor, grid: Grid, flips: int = 100) -> Tensor:
    """Codes (G, O, K): half of the remaining columns are rounded and refined, the rest makes up for it, and again.

    Rounding to nearest is kept for rows where it is better. At the end the codes of a whole row are refined once more,
    against the whole Gram matrix.

    Args:
        weight: (G, O, K) float64.
        gram: (G, K, K) with the ridge, positive definite.
        grid: the codes' meaning.
        flips: refinements of a row at each halving, at most.
    """
    rest, codes, start, total = weight.clone(), torch.empty_like(weight), 0, weight.shape[-1]
    while start < total:
        middle = start + (total - start + 1) // 2
        now, later = slice(start, middle), slice(middle, total)
        matrix, weights = gram[:, now, now], rest[..., now]
        answer = None
        if middle < total:
            factor = torch.linalg.cholesky(gram[:, later, later])
            answer = torch.cholesky_solve(gram[:, later, now], factor)
            matrix = matrix - gram[:, now, later] @ answer  # what is left of an error once the rest has made up for it
        codes[..., now] = flip(grid.nearest(weights), weights, matrix, grid, flips, neighbours=True)
        if answer is not None:
            rest[..., later] -= (grid.value(codes[..., now]) - weights) @ answer.transpose(1, 2)
        start = middle
    nearest = grid.nearest(weight)
    better = quadratic(grid.value(codes) - weight, gram) < quadratic(grid.value(nearest) - weight, gram)
    codes = torch.where(better.unsqueeze(-1), codes, nearest)
    return flip(codes, weight, gram, grid, flips, neighbours=False)
