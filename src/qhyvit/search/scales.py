"""Symmetric step candidates: factors on the step that just covers the largest magnitude (EasyQuant, PTQ4ViT)."""

from __future__ import annotations

import torch
from torch import Tensor

from qhyvit.quantizers.uniform import UniformAffine, uniform_from_range
from qhyvit.search.walk import ActivationError, WeightErrors


def best_weight_step(weight: Tensor, groups: Tensor, factors: Tensor, bits: int, errors: WeightErrors) -> UniformAffine:
    """The weight quantizer whose groups of output channels each have the factor of least error.

    Output channel o depends on filter o alone, so all groups take a candidate at once.

    Args:
        weight: (C_out, …).
        groups: (C_out,) the group, 0.., of each output channel: one step for each group.
        factors: (n,) candidates.
        bits: width of the codes.
        errors: of each output channel.
    """
    count = int(groups.max()) + 1
    reach = _reach(weight, groups)

    def build(factor: Tensor) -> UniformAffine:
        top = reach * factor
        return uniform_from_range(-top, top, bits=bits, scheme="symmetric", signed=True, axis=0)

    table = torch.stack([errors(build(f)) for f in factors])
    table = table.new_zeros(len(factors), count).index_add_(1, groups, table)
    return build(factors[table.argmin(0)][groups])


def symmetric_weight(weight: Tensor, groups: Tensor, bits: int) -> UniformAffine:
    """Factor 1: the step that covers the largest magnitude of each group of output channels."""
    top = _reach(weight, groups)
    return uniform_from_range(-top, top, bits=bits, scheme="symmetric", signed=True, axis=0)


def _reach(weight: Tensor, groups: Tensor) -> Tensor:
    """Largest magnitude in the group of each output channel, (C_out,)."""
    rows = weight.flatten(1).abs().amax(1)
    most = rows.new_zeros(int(groups.max()) + 1).scatter_reduce_(0, groups, rows, "amax")
    return most[groups]


def symmetric_activation(reach: Tensor, bits: int) -> UniformAffine:
    """The per-tensor symmetric quantizer that covers magnitudes up to `reach` ()."""
    return uniform_from_range(-reach, reach, bits=bits, scheme="symmetric", signed=False)


def best_activation_step(reach: Tensor, factors: Tensor, bits: int, error: ActivationError) -> UniformAffine:
    """The symmetric per-tensor quantizer of least error among factors (n,) on `reach` ()."""
    candidates = [symmetric_activation(reach * f, bits) for f in factors]
    found = torch.stack([error(q) for q in candidates])
    return candidates[int(found.argmin())]
