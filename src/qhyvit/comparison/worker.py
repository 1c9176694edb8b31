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
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import fx

from qhyvit.comparison.cache import Store, checksum
from qhyvit.comparison.peers import PEERS, Run
from qhyvit.comparison.subjects import BATCH, Subject, read_pictures, read_subject
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
        threads: of torch, and of the runtime of a peer's file.
        peer: name of the other quantizer to run, or None.
    """

    number: int
    recipe: Recipe
    subject: Path
    calibration: Path
    cells: Path
    decides: dict[str, Any]
    threads: int
    peer: str | None = None


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


class _Made(NamedTuple):
    """A quantized net, the seconds that it took, and what the table says of it."""

    run: Run
    seconds: float
    notes: tuple[str, ...]


def _by_method(job: Job, subject: Subject) -> _Made:
    started = time.perf_counter()
    quantized = quantize(subject.model, calib=read_pictures(job.calibration), recipe=job.recipe)
    seconds = time.perf_counter() - started
    return _Made(runner(quantized.simulation()), seconds, tuple(quantized.parameters.notes))


def _by_peer(job: Job, subject: Subject, name: str, scratch: Path) -> _Made:
    graph, pictures = subject.model.module, read_pictures(job.calibration).numpy()
    assert isinstance(graph, fx.GraphModule)  # as `subjects` wrote it
    peer = PEERS[name]
    run = peer.prepare(graph, pictures, scratch, job.recipe.saturation)
    started = time.perf_counter()
    written = run()
    seconds = time.perf_counter() - started
    return _Made(peer.open(written.file, job.threads), seconds, (written.note,))


def _score(job: Job) -> Outcome:
    subject = read_subject(job.subject)
    if job.peer is None:
        return _scored(_by_method(job, subject), subject)
    # OpenVINO may still hold its file in the end, and Windows deletes none that is held
    with TemporaryDirectory(prefix="qhyvit-peer-", ignore_cleanup_errors=True) as scratch:
        return _scored(_by_peer(job, subject, job.peer, Path(scratch)), subject)


def _scored(made: _Made, subject: Subject) -> Outcome:
    tally, reference = Tally(), Tally()
    with torch.no_grad():
        for start in range(0, len(subject.images), BATCH):
            part = slice(start, start + BATCH)
            labels = None if subject.labels is None else subject.labels[part]
            tally.update(made.run(subject.images[part]), labels, subject.logits[part])
            reference.update(subject.logits[part], labels)
    scores = tally.scores()
    return Outcome(
        reference.scores().top1,
        scores.top1,
        scores.agreement,
        scores.sqnr_db,
        made.seconds,
        scores.pictures,
        made.notes,
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
