"""Coarse-to-fine search over scale candidates, all channels at once.

The candidates are factors f on a base range: `linspace(0.01, 1.2, 100)` (Q-HyViT with the released bounds). Evaluating
each one is the expensive part, so every fourth is tried first and then the neighbours of the best ones; where channels
are separable each channel walks on its own. Brute force over all candidates is `coarse=1`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FACTORS = torch.linspace(0.01, 1.2, 100)
Errors = Callable[[Tensor], Tensor]  # factors (C,) → errors (C,), or a single one for all


def best_factors(errors: Errors, channels: int, *, coarse: int = 4, around: int = 2) -> tuple[Tensor, Tensor]:
    """Candidates of least error.

    Args:
        errors: error of a vector of factors, one for each separable channel (C = 1: one for the whole tensor).
        channels: C.
        coarse: try every so many candidates first.
        around: then the neighbours of so many of the best ones.

    Returns:
        Factors (C,) and their errors (C,).
    """
    n = len(FACTORS)
    table = torch.full((n, channels), torch.inf)
    first = list(range(n - 1, -1, -coarse))
    for i in first:
        table[i] = errors(FACTORS[i].expand(channels))
    if coarse > 1:
        best = table.topk(min(around, len(first)), dim=0, largest=False).indices
        for centre in best:
            for step in [s for d in range(1, coarse) for s in (d, -d)]:
                _try(table, errors, (centre + step).clamp(0, n - 1))
    index = table.argmin(0)
    return FACTORS[index], table.gather(0, index[None])[0]


def _try(table: Tensor, errors: Errors, index: Tensor) -> None:
    """Evaluate one candidate for each channel, unless all of them are known already."""
    known = table.gather(0, index[None])[0]
    if bool(known.isfinite().all()):
        return
    table.scatter_(0, index[None], errors(FACTORS[index])[None])
