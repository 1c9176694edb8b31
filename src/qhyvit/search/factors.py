"""Coarse-to-fine search over scale candidates, many candidates and all channels at once.

The candidates are factors f on a base range: `linspace(0.01, 1.2, 100)` (Q-HyViT with the released bounds). Every
fourth is tried first, from the widest range down to where clipping has long taken over, and then the neighbours of the
best ones; where channels are separable each channel walks on its own. Brute force over all candidates is `coarse=1`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FACTORS = torch.linspace(0.01, 1.2, 100)
PIECE = 4  # candidates between two looks at how the error grows
HOPELESS = 8.0  # times the least error: narrower ranges clip more still
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
    table = torch.full((n, channels), torch.inf)
    for piece in torch.split(first, PIECE if coarse > 1 else n):
        table[piece] = errors(factors[piece][:, None].expand(-1, channels)).cpu()
        if coarse > 1 and bool((table[piece] > HOPELESS * table.amin(0)).all()):
            break
    step = coarse
    while step > 1:
        step = -(-step // 2)
        centres = table.topk(min(around, len(first)), dim=0, largest=False).indices
        near = torch.cat([centres - step, centres + step]).clamp_(0, n - 1)
        near = near if channels > 1 else torch.unique(near).view(-1, 1)
        table.scatter_(0, near, errors(factors[near]).cpu())
    index = table.argmin(0)
    return factors[index], table.gather(0, index[None])[0]
