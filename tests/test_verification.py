from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qhyvit import verification
from qhyvit.errors import ModelError, TargetError
from qhyvit.evaluation import evaluate
from qhyvit.store import save
from qhyvit.verification import processor_name, verify
from tiny import fresh, pictures, quantized


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Runtime:
    """A runtime that changes what the simulation gives."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.simulation, self.change = quantized().simulation(), change

    def run(self, images: Tensor) -> Tensor:
        out: Tensor = self.change(self.simulation(images).clone())
        return out

    def operators(self) -> tuple[int, int]:
        return 3, 4


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], Tensor]], None]:
    def install(change: Callable[[Tensor], Tensor]) -> None:
        @contextmanager
        def session(*_: object) -> Iterator[Runtime]:
            yield Runtime(change)

        monkeypatch.setattr(verification, "session", session)

    return install


def test_the_real_runtime_computes_what_the_simulation_says(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d.npz")
    found = verify(quantized(), data, batch=5)
    assert found.sqnr_db > 25
    assert found.top1_agreement > 0.9
    assert found.integer_ops >= 3  # two convolutions, two linears
    assert found.pictures == 24
    assert found == verify(quantized(), data, folder=save(quantized(), tmp_path / "out"), batch=5)


def test_another_models_file_is_found_out(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d.npz")
    right = verify(quantized(), data)
    wrong = verify(quantized(), data, folder=save(fresh(bits="w3a3"), tmp_path / "other"))
    assert wrong.sqnr_db < right.sqnr_db - 6
    assert wrong.max_difference > 2 * right.max_difference


def test_equal_is_200_dB(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend(lambda logits: logits)
    found = verify(quantized(), pictures(tmp_path / "d.npz"))
    assert (found.sqnr_db, found.top1_agreement, found.max_difference) == (200, 1, 0)
    assert (found.integer_ops, found.float_ops) == (3, 4)
    assert found.cpu == processor_name()


def test_differences_by_hand(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend(lambda logits: 0.9 * logits)  # noise is a hundredth of the signal
    data = pictures(tmp_path / "d.npz")
    found = verify(quantized(), data, batch=10)
    assert found.sqnr_db == pytest.approx(20, abs=1e-3)
    assert found.top1_agreement == 1
    pretend(lambda logits: -logits)
    assert verify(quantized(), data).top1_agreement == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_the_worst_and_valid_json(
    tmp_path: Path, pretend: Callable[..., None], bad: float
) -> None:
    pretend(lambda logits: logits.fill_(bad))
    found = verify(quantized(), pictures(tmp_path / "d.npz")).to_dict()
    assert found["sqnr_db"] == -200
    assert found["max_difference"] > 1e38
    json.dumps(found, allow_nan=False)


def test_a_limit_is_kept(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend(lambda logits: logits)
    assert verify(quantized(), pictures(tmp_path / "d.npz"), limit=5).pictures == 5


def test_labels_do_not_matter(tmp_path: Path, pretend: Callable[..., None]) -> None:
    pretend(lambda logits: logits)
    assert verify(quantized(), "flowers", limit=2).pictures == 2  # five classes, the net has seven


def test_what_cannot_be_verified_says_so(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d.npz")
    with pytest.raises(TargetError, match="simulate"):
        verify(fresh(target="simulate"), data)
    with pytest.raises(ModelError, match=r"model\.onnx is missing"):
        verify(quantized(), data, folder=tmp_path)


def test_evaluation_and_verification_agree(tmp_path: Path) -> None:
    """Both run the same files: where simulation and runtime agree, so do their agreements with float."""
    data = pictures(tmp_path / "d.npz")
    scores = evaluate(quantized(), data)
    simulated, deployed = scores["simulated"], scores["deployed"]
    assert simulated is not None
    assert deployed is not None
    assert simulated.agreement is not None
    assert deployed.agreement is not None
    slack = 1 - verify(quantized(), data).top1_agreement
    assert abs(simulated.agreement - deployed.agreement) <= slack + 1e-9
