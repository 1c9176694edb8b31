"""Ridge compensation of quantization errors (ERQ: Zhong et al., ICML 2024, arXiv 2407.06794), in float64.

A layer is G groups of O outputs that read K numbers each: (1, O, K) for a linear or 1×1 convolution, the unfolded
patches of a k×k one, (C, 1, k²) where it is depthwise. The bias is the weight of a further input that is always one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qhyvit.graph.ops import CONVOLUTIONS, LINEAR, argument, as_list, is_call

_BIAS = 1e-9  # ridge of the bias, as a share of the number of rows: only to keep the matrix regular


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of a layer's inputs x̄ (the quantized ones, a one behind them) and of what its output misses.

    Attributes:
        gram: Σ x̄ x̄ᵀ (G, K + 1, K + 1).
        cross: Σ x̄ rᵀ (G, K + 1, O), r = y - W̄ x̄ the float output minus that of the float weights on x̄.
        energy: Σ r² (G, O).
        rows: how many.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    rows: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.gram + other.gram, self.cross + other.cross, self.energy + other.energy, self.rows + other.rows
        )

    def error(self, change: Tensor) -> Tensor:
        """Σ (r - δ x̄)² (G, O) once the weights have changed by δ (G, O, K + 1)."""
        linear = (change @ self.cross).diagonal(dim1=-2, dim2=-1)
        return (self.energy - 2 * linear + ((change @ self.gram) * change).sum(-1)).clamp_min(0)

    def penalty(self, rho: float) -> Tensor:
        """The ridge of each input (G, K + 1): ρ times the mean of the inputs' squares; next to none for the bias."""
        squares = self.gram.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(-1, keepdim=True)
        ridge = (rho * squares).clamp_min(torch.finfo(torch.float64).tiny).expand(-1, self.gram.shape[-1] - 1)
        return torch.cat([ridge, torch.full_like(squares, _BIAS * self.rows)], -1)


def reads_patches(node: fx.Node) -> bool:
    """Whether `moments` knows a layer's form: linear or two-dimensional convolution."""
    return is_call(node, LINEAR) or (is_call(node, CONVOLUTIONS) and len(node.meta["shape"]) == 4)


def moments(node: fx.Node, weight: Tensor, x: Tensor, coded: Tensor) -> Moments:
    """Moments of one batch.

    Args:
        node: a linear or a two-dimensional convolution.
        weight: its float weight (O·G, K…).
        x: input in the float network.
        coded: input in the quantized one, the same shape.
    """
    weight, missing = weight.double(), (x.double() - coded.double())
    if is_call(node, LINEAR):
        patches = coded.double().reshape(1, -1, coded.shape[-1])
        residual = (missing @ weight.t()).reshape(1, patches.shape[1], -1)
    else:
        groups = argument(node, "groups", 1)
        rest = {
            name: as_list(argument(node, name, d), 2) for name, d in (("stride", 1), ("padding", 0), ("dilation", 1))
        }
        residual = F.conv2d(missing, weight, None, groups=groups, **rest)  # type: ignore[arg-type]
        residual = residual.movedim(1, 0).reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
        unfolded = F.unfold(coded.double(), tuple(weight.shape[2:]), **rest)  # type: ignore[arg-type]
        patches = unfolded.movedim(1, 0).reshape(groups, weight[0].numel(), -1).transpose(1, 2)
    patches = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
    return Moments(
        patches.transpose(1, 2) @ patches,
        patches.transpose(1, 2) @ residual,
        residual.square().sum(1),
        patches.shape[1],
    )


def solve(m: Moments, rho: float) -> Tensor:
    """δ (G, O, K + 1) that minimises Σ (r - δ x̄)² + λ δ²; the last column is that of the bias (ERQ's Aqer)."""
    matrix = m.gram + torch.diag_embed(m.penalty(rho))
    return torch.cholesky_solve(m.cross, torch.linalg.cholesky(matrix)).transpose(1, 2)


def choose_rho(fit: Moments, held_out: Moments | None, candidates: tuple[float, ...]) -> float | None:
    """The ρ whose δ, fitted on some pictures, leaves least on others; None where none is better than δ = 0.

    Without other pictures it is the largest, the most careful.
    """
    if held_out is None:
        return max(candidates)
    best, least = None, float(held_out.energy.sum())
    for rho in candidates:
        error = float(held_out.error(solve(fit, rho)).sum())
        if error < least:
            best, least = rho, error
    return best
