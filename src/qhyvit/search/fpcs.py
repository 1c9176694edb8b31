"""Fast progressive combining search of scale and zero point (AdaLog, arXiv 2407.12951)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Errors = Callable[[Tensor, Tensor], Tensor]
"""Scales (C,) and zero points (C,) to errors (C,); C = 1 for a whole tensor."""

NARROWING = 7.5


def fpcs(
    errors: Errors,
    smallest: Tensor,
    largest: Tensor,
    zero_points: Tensor,
    *,
    candidates: int = 128,
    keep: int = 16,
    fan: int = 8,
    steps: int = 6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero point of least error, each channel by itself.

    All zero points with scales on a grid first; then, step by step, the best ones with `fan` scales around each, as far
    apart as the grid before was, and 7.5 times closer each step. (The published grid loses its centre; here the best
    ones stay in the race.)

    Args:
        errors: of one candidate for each channel.
        smallest: (C,) smallest scale, positive.
        largest: (C,) largest scale.
        zero_points: (n, C) to try.
        candidates: in the first step, over all zero points.
        keep: how many go on.
        fan: scales around each.
        steps: in all.

    Returns:
        Scales, zero points and errors, (C,) each.
    """
    count = max(candidates // len(zero_points), 2)
    grid = torch.lerp(smallest, largest, torch.linspace(0, 1, count, dtype=smallest.dtype)[:, None])  # (count, C)
    scales = grid.repeat(len(zero_points), 1)
    zeros = zero_points.repeat_interleave(count, 0)
    table = _table(errors, scales, zeros)
    width = (largest - smallest) / (count - 1)
    for _ in range(steps - 1):
        best = table.topk(min(keep, len(table)), dim=0, largest=False).indices
        scales, zeros, table = (t.gather(0, best) for t in (scales, zeros, table))
        around = torch.linspace(-0.5, 0.5, fan, dtype=width.dtype)[:, None] * width
        new = (scales[:, None] + around).flatten(0, 1).clamp(min=torch.finfo(scales.dtype).tiny)
        new_zeros = zeros.repeat_interleave(fan, 0)
        scales, zeros = torch.cat([scales, new]), torch.cat([zeros, new_zeros])
        table = torch.cat([table, _table(errors, new, new_zeros)])
        width = width / NARROWING
    winner = table.argmin(0, keepdim=True)
    return scales.gather(0, winner)[0], zeros.gather(0, winner)[0], table.gather(0, winner)[0]


def _table(errors: Errors, scales: Tensor, zeros: Tensor) -> Tensor:
    return torch.stack([errors(s, z) for s, z in zip(scales, zeros, strict=True)])


def zero_points_around(centre: Tensor, count: int, lowest: int, highest: int) -> Tensor:
    """`count` consecutive zero points (count, C) around (C,), moved to lie within the codes."""
    first = (centre - count // 2).clamp(lowest, max(highest - count + 1, lowest))
    return first + torch.arange(count, dtype=centre.dtype)[:, None]
