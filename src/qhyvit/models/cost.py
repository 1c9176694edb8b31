"""What a net costs, counted without running it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(module: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of convolutions, linear layers and matrix products for one picture; nothing else is counted.

    Args:
        module: takes (1, *input_size); it is copied without its weights, which may already be missing (device "meta").
        input_size: channels, height, width.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        bare = copy.deepcopy(module).to("meta").eval().requires_grad_(False)
        bare(torch.zeros(1, *input_size))
    flops: int = counter.get_total_flops()
    return flops // 2
