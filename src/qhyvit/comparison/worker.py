"""One cell, in whatever process: quantize, score, keep."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qhyvit.comparison.cache import Store, checksum
from qhyvit.comparison.subjects import BATCH, read_pictures, read_subject
from qhyvit.comparison.table import Outcome
from qhyvit.errors import QhyvitError
from qhyvit.evaluation import Tally, runner
from qhyvit.pipeline import quantize
from qhyvit.progress import hidden
from qhyvit.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """One cell for another process: paths and plain data.

    Attributes:
        number: handed back with the outcome.
        recipe: what is run.
        subject: folder of the net or twin (`subjects.Shared`).
        calibration: folder of the pictures.
        cells: folder of finished cells.
        decides: as `cache.decisive` gave it.
        threads: of torch.
    """

    number: int
    recipe: Recipe
    subject: Path
    calibration: Path
    cells: Path
    decides: dict[str, Any]
    threads: int


def run_job(job: Job) -> tuple[int, Outcome]:
    """Quantize and score; what comes out is kept before it is handed back, so that Ctrl-C loses nothing finished."""
    _leave_ctrl_c_to_the_parent()
    try:
        with hidden(), torch_threads(job.threads):
            outcome = _score(job)
    except QhyvitError as error:
        return job.number, Outcome(error=str(error))
    Store(job.cells).put(checksum(job.decides), job.decides, outcome)
    return job.number, outcome


def _leave_ctrl_c_to_the_parent() -> None:
    """A terminal interrupts all processes of a command; joblib's are ended by the parent, without a stack trace."""
    started_by_joblib = multiprocessing.current_process().name != "MainProcess"
    if started_by_joblib and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _score(job: Job) -> Outcome:
    subject = read_subject(job.subject)
    started = time.perf_counter()
    quantized = quantize(subject.model, calib=read_pictures(job.calibration), recipe=job.recipe)
    seconds = time.perf_counter() - started
    run, tally, reference = runner(quantized.simulation()), Tally(), Tally()
    with torch.no_grad():
        for start in range(0, len(subject.images), BATCH):
            part = slice(start, start + BATCH)
            labels = None if subject.labels is None else subject.labels[part]
            tally.update(run(subject.images[part]), labels, subject.logits[part])
            reference.update(subject.logits[part], labels)
    scores = tally.scores()
    return Outcome(
        reference.scores().top1,
        scores.top1,
        scores.agreement,
        scores.sqnr_db,
        seconds,
        scores.pictures,
        tuple(quantized.parameters.notes),
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many torch threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
