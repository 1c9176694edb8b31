from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qhyvit import latency as module
from qhyvit.errors import ModelError, TargetError
from qhyvit.latency import WARM_UP, bench, latency
from qhyvit.store import save
from tiny import SIDE, fresh, quantized


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_medians_by_hand() -> None:
    pairs = [(0.004, 0.002), (0.006, 0.002), (0.009, 0.001)]  # ratios 2, 3, 9
    found = latency(pairs, 2)
    assert (found.float_ms, found.integer_ms, found.speedup) == pytest.approx((6, 2, 3))
    assert (found.threads, found.runs) == (2, 3)
    assert json.loads(json.dumps(found.to_dict()))["speedup"] == 3


def test_each_model_runs_as_often_and_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    @contextmanager
    def session(*_: object, quantized: bool = True, threads: int) -> Iterator[Runtime]:
        assert threads == 3
        yield Runtime("integer" if quantized else "float")

    class Runtime:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, images: Tensor) -> None:
            assert images.shape == (2, 3, SIDE, SIDE)
            clock[0] += {"float": 5.0, "integer": 2.0}[self.name]
            ran.append(self.name)

    clock = [0.0]
    monkeypatch.setattr(module, "session", session)
    monkeypatch.setattr(module, "_clock", lambda threads: lambda: clock[0])
    found = bench(quantized(), runs=4, threads=3, batch=2)
    assert (found.float_ms, found.integer_ms, found.speedup, found.runs) == (5000, 2000, 2.5, 4)
    timed = ran[2 * WARM_UP :]
    assert timed == ["float", "integer", "integer", "float"] * 2


@pytest.mark.parametrize("threads", [1, 2])
def test_real_files_are_timed(tmp_path: Path, threads: int) -> None:
    folder = save(quantized(), tmp_path / "out")
    found = bench(quantized(), folder=folder, runs=2, threads=threads)
    assert min(found.float_ms, found.integer_ms, found.speedup) > 0


def test_what_cannot_be_timed_says_so(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="simulate"):
        bench(fresh(target="simulate"))
    with pytest.raises(ModelError, match=r"model\.onnx is missing"):
        bench(quantized(), folder=tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        bench(quantized(), runs=0)
