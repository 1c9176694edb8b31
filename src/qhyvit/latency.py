"""Latency of the integer model against the float model, in the same runtime on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qhyvit.evaluation import rounded
from qhyvit.progress import task
from qhyvit.quantized import QuantizedModel
from qhyvit.runtime import session
from qhyvit.targets import Session

WARM_UP = 5  # runs of each model before any is timed: memory is allocated, caches are filled


@dataclass(frozen=True)
class Latency:
    """Time for one batch.

    Attributes:
        float_ms: median of the float model, milliseconds.
        integer_ms: median of the integer model, milliseconds.
        speedup: median over pairs of neighbouring runs of float time / integer time.
        threads: of the runtime.
        runs: timed runs of each model.
    """

    float_ms: float
    integer_ms: float
    speedup: float
    threads: int
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, rounded to 6 digits, JSON-able."""
        return rounded(asdict(self))


def bench(
    model: QuantizedModel, *, folder: Path | None = None, runs: int = 50, threads: int = 1, batch: int = 1
) -> Latency:
    """Time float and integer model on random pictures, taking turns so that a busy machine slows both alike.

    At one thread the process's CPU time counts, which other processes do not lengthen; else wall time.

    Args:
        model: its float graph is exported too.
        folder: where the model was saved; None: it is exported to a temporary folder.
        runs: timed runs of each model.
        threads: of the runtime.
        batch: pictures a run.

    Raises:
        TargetError: if the target has no runtime.
        ModelError: if `folder` lacks the exported file.
        ValueError: if a number is below 1.
    """
    if min(runs, threads, batch) < 1:
        raise ValueError(f"runs {runs}, threads {threads} and batch {batch} must be at least 1")
    size = model.info["preprocessing"]["input_size"]
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    clock = _clock(threads)
    with (
        session(model, quantized=False, threads=threads) as in_float,
        session(model, folder, threads=threads) as in_integer,
        task("Timing", runs) as advance,
    ):
        for _ in range(WARM_UP):
            in_float.run(images)
            in_integer.run(images)
        pairs = []
        for turn in range(runs):
            first, second = (in_float, in_integer) if turn % 2 == 0 else (in_integer, in_float)
            one, other = _timed(clock, first, images), _timed(clock, second, images)
            pairs.append((one, other) if first is in_float else (other, one))
            advance(1)
    return latency(pairs, threads)


def latency(pairs: list[tuple[float, float]], threads: int) -> Latency:
    """Sum up pairs of times in seconds (float, integer)."""
    float_ms, integer_ms = (1000 * median(times) for times in zip(*pairs, strict=True))
    return Latency(float_ms, integer_ms, median(a / b for a, b in pairs), threads, len(pairs))


def _clock(threads: int) -> Callable[[], float]:
    coarse = time.get_clock_info("process_time").resolution > 1e-5  # Windows counts in steps of 16 ms
    return time.process_time if threads == 1 and not coarse else time.perf_counter


def _timed(clock: Callable[[], float], runtime: Session, images: Tensor) -> float:
    start = clock()
    runtime.run(images)
    return clock() - start
