"""How far the channels of a value reach, as far as a few pictures tell, before they are evened out.

A channel that hardly stirs on the calibration pictures may live on others. Evened out by what was seen of it, it would
be clipped there, and its weights, grown by as much, would make that felt. So a channel is left room to give a part of
what the strongest one gives to the outputs of the layers behind: that costs next to nothing, since its noise there is
the same small part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qhyvit.search.errors import LayerError

PLENTY = 1024  # numbers a channel; of fewer, less is believed
RESERVE = 1 / 32  # of the strongest channel's part in a layer's outputs, left to every channel

Readers = list[tuple[LayerError, Tensor]]
"""Layers that read a value, with the channel (C_in,) that each of their inputs is; negative: none of the value's."""


def belief(count: float) -> float:
    """How far the range of a channel is believed that `count` numbers tell of, up to 1.

    It falls with the root, as what such numbers leave unknown of a range does.
    """
    return math.sqrt(min(1.0, count / PLENTY))


def with_room(reach: Tensor, readers: Readers, count: float) -> Tensor:
    """Reaches (C,) for evening out, at most the largest.

    Args:
        reach: largest magnitude of each channel, (C,).
        readers: the layers. In those with groups every channel has outputs of its own and needs no room.
        count: numbers of each channel that were seen.
    """
    part = torch.zeros_like(reach)  # of the strongest channel's outputs, for a reach of 1
    tiny = torch.finfo(reach.dtype).tiny
    for layer, channels in readers:
        if layer.groups > 1:
            return reach
        inside = channels >= 0
        rows = torch.linalg.vector_norm(layer.weight[0], dim=-1)  # (K,)
        columns = torch.zeros(len(channels)).scatter_reduce_(0, layer.channel_of[0], rows, "amax")
        norm = torch.zeros_like(reach).scatter_reduce_(0, channels[inside], columns[inside], "amax")
        part = torch.maximum(part, norm / (norm * reach).max().clamp_min(tiny))
    least = max(RESERVE, 1 - belief(count)) / part.clamp_min(tiny)
    return torch.minimum(torch.maximum(reach, least), reach.max())
