"""Channel factors that make a distribution easy to quantize, by gradient descent (QADS of HyQ, IJCAI 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST_STEPS_PER_RANGE = 1e-8


def scaled_outputs(
    x: Tensor, weight: Tensor, low: Tensor, high: Tensor, alpha: Tensor, weight_bits: int, activation_bits: int
) -> Tensor:
    """Outputs (M, O) of Q_a(x / α)·Q_w(W·α)ᵀ, straight-through in every rounding.

    Args:
        x: inputs (M, C).
        weight: (O, C).
        low: (C,) smallest value of each channel; the quantizer covers all channels' extremes divided by α.
        high: (C,) largest.
        alpha: (C,) positive.
        weight_bits: of the symmetric weight quantizer, per output channel.
        activation_bits: of the asymmetric activation quantizer, per tensor.
    """
    bottom, top = (low / alpha).amin().clamp(max=0), (high / alpha).amax().clamp(min=0)
    levels = (1 << activation_bits) - 1
    scale = ((top - bottom) / levels).clamp_min(FEWEST_STEPS_PER_RANGE)
    zero = torch.round(-bottom.detach() / scale.detach()).clamp(0, levels)
    inputs = ((_round(x / alpha / scale) + zero).clamp(0, levels) - zero) * scale
    half = 1 << (weight_bits - 1)
    scaled = weight * alpha
    steps = (scaled.abs().amax(1, keepdim=True) / (half - 0.5)).clamp_min(FEWEST_STEPS_PER_RANGE)
    return inputs @ (_round(scaled / steps).clamp(-half, half - 1) * steps).t()


def _round(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def distribution_scaling(
    layers: list[tuple[Tensor, Tensor]],
    low: Tensor,
    high: Tensor,
    weight_bits: int,
    activation_bits: int,
    *,
    steps: int,
    rate: float,
) -> tuple[Tensor, float, float]:
    """α of least squared output error, never worse than α = 1.

    Adam with a cosine rate on a = ln α, so that α stays positive; the α of lowest loss is kept.

    Args:
        layers: inputs (M, C) and weight (O, C) of each layer that reads the value.
        low: (C,) smallest value of each channel.
        high: (C,) largest.
        weight_bits: width of the weights.
        activation_bits: width of the value.
        steps: of Adam.
        rate: its first learning rate.

    Returns:
        α (C,), its loss, and that of α = 1.
    """
    exponent = torch.zeros_like(low, requires_grad=True)
    optimiser = torch.optim.Adam([exponent], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    best, least, first = torch.ones_like(low), float("inf"), float("inf")
    targets = [x @ weight.t() for x, weight in layers]
    for step in range(steps + 1):
        with torch.enable_grad():
            alpha = exponent.exp()
            loss = torch.stack(
                [
                    (scaled_outputs(x, w, low, high, alpha, weight_bits, activation_bits) - y).square().mean()
                    for (x, w), y in zip(layers, targets, strict=True)
                ]
            ).sum()
        value = loss.item()
        if step == 0:
            first = value
        if value < least:
            best, least = alpha.detach().clone(), value
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return best, least, first
