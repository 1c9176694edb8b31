"""The net and the pictures that ship with the package: quantized as by default, of fewer pictures, exported, run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qhyvit.evaluation import evaluate
from qhyvit.pipeline import quantize
from qhyvit.quantized import QuantizedModel
from qhyvit.store import load, save
from qhyvit.targets import cpu
from qhyvit.verification import verify

SOME = 150


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedModel, Path]:
    model = quantize(calibration={"size": 32})
    return model, save(model, tmp_path_factory.mktemp("demo") / "out")


def test_the_default_recipe(saved: tuple[QuantizedModel, Path]) -> None:
    recipe = saved[0].recipe
    assert (recipe.bits, recipe.method, recipe.scope, recipe.target) == ("w8a8", "qhyvit", "partial", "onnxruntime")
    assert saved[0].info["calibration"] == {"source": "flowers (built in, calibration)", "pictures": 32}
    assert saved[0].info["trained"]


@pytest.mark.skipif(cpu.saturates(), reason="measured only where sums of u8×s8 products do not saturate")
def test_the_runtime_computes_what_the_simulation_says(saved: tuple[QuantizedModel, Path]) -> None:
    model, folder = saved
    found = verify(model, folder=folder, limit=SOME)
    assert found.pictures == SOME
    assert found.sqnr_db >= 30
    assert found.top1_agreement >= 0.99


def test_it_runs_in_integers(saved: tuple[QuantizedModel, Path]) -> None:
    model, folder = saved
    found = verify(model, folder=folder, limit=1)
    assert found.integer_ops >= 90
    assert found.integer_ops >= len(model.sites.weights)


def test_little_accuracy_is_lost(saved: tuple[QuantizedModel, Path]) -> None:
    model, folder = saved
    scores = evaluate(model, folder=folder, limit=SOME)
    exact, deployed = scores["float"], scores["deployed"]
    assert exact is not None
    assert deployed is not None
    assert exact.top1 is not None
    assert deployed.top1 is not None
    assert deployed.agreement is not None
    assert exact.pictures == deployed.pictures == SOME
    assert exact.top1 > 0.7
    assert exact.top1 - deployed.top1 <= 0.03
    assert deployed.agreement > 0.9


def test_the_files_are_small_and_suffice(saved: tuple[QuantizedModel, Path]) -> None:
    model, folder = saved
    assert (folder / "model.onnx").stat().st_size < 0.35 * (folder / "float.safetensors").stat().st_size
    again = load(folder)
    size = again.info["preprocessing"]["input_size"]
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.simulation()(x), model.simulation()(x))


@pytest.mark.slow
def test_within_one_point_on_all_pictures(saved: tuple[QuantizedModel, Path]) -> None:
    model, folder = saved
    scores = evaluate(model, folder=folder)
    exact, deployed = scores["float"], scores["deployed"]
    assert exact is not None
    assert deployed is not None
    assert exact.top1 is not None
    assert deployed.top1 is not None
    assert exact.pictures == 736
    assert exact.top1 - deployed.top1 <= 0.01
