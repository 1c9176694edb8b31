"""How far a training run has come, in epochs or in minutes, and the learning rate that goes with it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A part of the training at one picture size.

    Args:
        size: side of the pictures in pixels.
        lr: learning rate at its start (after the warm-up, if it is the first).
        lr_end: learning rate at its end; a cosine leads there.
        epochs: how long it is; or
        share: its share of the run's minutes.
    """

    size: int
    lr: float
    lr_end: float = 1e-6
    epochs: int | None = None
    share: float | None = None

    def rate(self, at: float) -> float:
        """Learning rate at a share 0..1 of the stage."""
        return self.lr_end + (self.lr - self.lr_end) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, at)))


def read_stages(recipe: dict[str, Any], minutes: float | None) -> list[Stage]:
    """The recipe's stages; all of them by epochs, or all by share of the minutes.

    Raises:
        SystemExit: if a stage has neither or both, or there are shares but no minutes.
    """
    stages = [Stage(**stage) for stage in recipe["stages"]]
    for stage in stages:
        if (stage.epochs is None) == (stage.share is None):
            raise SystemExit(f"{recipe['name']}: a stage needs either epochs or a share of the minutes.")
    if any(stage.share for stage in stages):
        if not minutes:
            raise SystemExit(f"{recipe['name']}: its stages are shares of a time; give --minutes.")
        if abs(sum(stage.share or 0 for stage in stages) - 1) > 1e-6:
            raise SystemExit(f"{recipe['name']}: the shares of the stages must add up to 1.")
    return stages


class Clock:
    """Seconds trained, over all runs of a resumed training."""

    def __init__(self, before: float = 0.0) -> None:
        self._before, self._started = before, time.monotonic()

    @property
    def seconds(self) -> float:
        """Of this run and those before it."""
        return self._before + time.monotonic() - self._started

    def restart(self, before: float) -> None:
        """Begin again with `before` seconds already trained."""
        self._before, self._started = before, time.monotonic()
