"""Where offsets may enter and leave a stream: a small linear system for each channel.

An offset that a producer adds to a channel arrives at every consumer behind it. Where none may arrive (before operators
that do not keep offsets; before zero padding, unless an addition may remain there) the sum must be 0; elsewhere it
should be 1, and the consumer's bias undoes it. So the first convolution of a stage may add an offset that the last one
takes away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qhyvit.graph.tracing_rules import Step

_SNAP = 1e-9


@dataclass(frozen=True)
class Arrivals:
    """What arrives of each producer's offsets.

    Attributes:
        at: by value, float64 (P, K): how often the offset of producer p arrives in channel k; NaN where that differs
            from place to place.
        blocked: (P, K) each: what would arrive at operators that do not keep offsets.
    """

    at: dict[fx.Node, Tensor]
    blocked: list[Tensor]


def arrivals(
    steps: Mapping[fx.Node, Step],
    nodes: Sequence[fx.Node],
    present: Mapping[fx.Node, Tensor],
    producers: Mapping[fx.Node, int],
) -> Arrivals:
    """Follow the offsets of all producers through a stream.

    Args:
        steps: how operators hand numbers on.
        nodes: the stream's values in graph order.
        present: bool (K,): which channels each value holds.
        producers: number p of each producer.
    """
    found = Arrivals({}, [])
    channels = len(present[nodes[0]])
    for node in nodes:
        out = torch.zeros(len(producers), channels, dtype=torch.float64)
        if node in producers:
            out[producers[node], present[node]] = 1
        else:
            step = steps[node]
            parts = [(found.at[s] * sign, present[s]) for s, sign in step.sources if s in found.at]
            if not step.keeps_offset:
                found.blocked.extend(torch.where(held & present[node], part, 0.0) for part, held in parts)
            elif step.joins:
                out = _side_by_side(parts, out)
            else:
                out = sum((part for part, _ in parts), out)
        found.at[node] = out
    return found


def _side_by_side(parts: list[tuple[Tensor, Tensor]], out: Tensor) -> Tensor:
    seen = torch.zeros(out.shape[1], dtype=torch.bool)
    for part, held in parts:
        differs = held & seen & (part != out).any(0)
        out = torch.where(differs, torch.nan, torch.where(held & ~seen, part, out))
        seen = seen | held
    return out


def entering(rows: Sequence[Tensor], wanted: Sequence[bool]) -> Tensor:
    """Offsets of each producer, so that 0 arrives where none is wanted, and as near to 1 as can be elsewhere.

    Args:
        rows: (P, K) each: how often each producer's offset arrives there; all 0 for a channel that is not read there.
        wanted: whether an offset may arrive.

    Returns:
        Float64 (P, K); 0 for channels into which no offset can be brought. The largest that arrives anywhere is 1.
    """
    system = torch.stack(list(rows)).permute(2, 0, 1)  # (K, R, P)
    known = ~system.isnan().flatten(1).any(1)
    system = system.nan_to_num()
    may = torch.tensor(list(wanted))
    open_, closed = system[:, may], system[:, ~may]
    count = system.shape[2]
    free = torch.eye(count, dtype=torch.float64).expand(len(system), count, count)
    if closed.shape[1]:
        free = free - torch.linalg.pinv(closed) @ closed  # all that arrives nowhere where it must not
    if not open_.shape[1]:
        return torch.zeros(count, len(system), dtype=torch.float64)
    goal = (open_ != 0).any(2, keepdim=True).double()
    # atol: what should be 0 is 1e-16 at times, and no relative tolerance would drop that where all else is 0
    solved = free @ (torch.linalg.pinv(open_ @ free, atol=_SNAP, rtol=_SNAP) @ goal)
    solved = torch.where((solved - solved.round()).abs() < _SNAP, solved.round(), solved)
    reach = (open_ @ solved).abs().amax(1, keepdim=True)
    usable = (reach > 1e-6) & known.view(-1, 1, 1)
    return torch.where(usable, solved / torch.where(usable, reach, 1.0), 0.0).squeeze(2).T.contiguous()
