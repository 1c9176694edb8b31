"""Whole positions of values: for what is decided channel by channel and needs more than extremes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from qhyvit.calibration.collect import Watcher
from qhyvit.methods.base import Problem
from qhyvit.progress import task


def sample_rows(problem: Problem, axes: dict[str, int], count: int) -> dict[str, Tensor]:
    """Positions of values in the float network, drawn evenly from all calibration pictures.

    Args:
        problem: graph, pictures and seed.
        axes: the channel axis of each value, by node name.
        count: positions of each value, about.

    Returns:
        (n, C) by name.
    """
    generator = torch.Generator().manual_seed(problem.recipe.seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in axes}

    def watch(node: fx.Node, value: Tensor) -> None:
        rows = value.movedim(axes[node.name], -1).flatten(0, -2)
        share = math.ceil(count * batch / max(problem.picture_count, batch))
        index = torch.randperm(len(rows), generator=generator)[:share]
        parts[node.name].append(rows[index])

    if axes:
        with torch.inference_mode(), task("Sampling", problem.picture_count) as advance:
            watcher = Watcher(problem.graph, axes, watch)
            for images in problem.pictures():
                batch = len(images)
                watcher.run(images)
                advance(batch)
    return {name: torch.cat(found).clone() for name, found in parts.items()}
