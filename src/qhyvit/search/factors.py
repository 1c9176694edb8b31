"""Coarse-to-fine search over scale candidates, many candidates and all channels at once.

The candidates are factors f on a base range: `linspace(0.01, 1.2, 100)` (Q-HyViT with the released bounds). Every
fourth is tried first and then the neighbours of the best ones; where channels are separable each channel walks on its
own. Brute force over all candidates is `coarse=1`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FACTORS = torch.linspace(0.01, 1.2, 100)
Errors = Callable[[Tensor], Tensor]  # factors (B, C) → errors (B, C), or (B, 1) each for all channels


def best_factors(
    errors: Errors,
    channels: int,
    *,
    factors: Tensor = FACTORS,
    coarse: int = 4,
    around: int = 3,
) -> tuple[Tensor, Tensor]:
    """Candidates of least error.

    Args:
        errors: errors of B candidates, a factor for each separable channel (C = 1: one for the whole tensor).
        channels: C.
        factors: the candidates (n,), ascending.
        coarse: try every so many candidates first.
        around: then the neighbours of so many of the best ones.

    Returns:
        Factors (C,) and their errors (C,).
    """
    n = len(factors)
    first = torch.arange(n - 1, -1, -coarse)
    index = first[:, None].expand(-1, channels)
    table = torch.full((n, channels), torch.inf)
    table[first] = errors(factors[index]).cpu()
    if coarse > 1:
        centres = table.topk(min(around, len(first)), dim=0, largest=False).indices
        steps = torch.tensor([s for d in range(1, coarse) for s in (d, -d)])
        near = (centres[:, None] + steps[None, :, None]).flatten(0, 1).clamp(0, n - 1)
        near = near if channels > 1 else torch.unique(near).view(-1, 1)
        table.scatter_(0, near, errors(factors[near]).cpu())
    index = table.argmin(0)
    return factors[index], table.gather(0, index[None])[0]
