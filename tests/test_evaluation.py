from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from qhyvit import evaluation
from qhyvit.data.dataset import open_dataset
from qhyvit.errors import DataError, ModelError
from qhyvit.evaluation import Scores, Tally, evaluate, sqnr
from qhyvit.models.load import LoadedModel, load_model
from qhyvit.pipeline import export
from qhyvit.quantized import QuantizedModel
from qhyvit.store import save
from tiny import CLASSES, SIDE, Tiny, fresh, pictures, quantized

RAW = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0, "interpolation": "nearest", "crop_mode": "center"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Pixels(nn.Module):
    """A net whose logits are the first red pixels of the picture."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0].flatten(1)[:, : self.classes]


def pixels(classes: int) -> LoadedModel:
    return LoadedModel(
        "pixels", Pixels(classes), RAW | {"input_size": (3, 4, 4)}, classes, None, "by hand", trained=True
    )


def write(path: Path, logits: list[list[int]], labels: list[int] | None = None) -> Path:
    """Pictures on which `Pixels` gives these logits (0 to 255), divided by 255."""
    images = np.zeros((len(logits), 16, 3), dtype=np.uint8)
    images[:, : len(logits[0]), 0] = logits
    arrays = {"images": images.reshape(-1, 4, 4, 3)} | ({} if labels is None else {"labels": np.array(labels)})
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_top1_and_top5_by_hand(tmp_path: Path) -> None:
    # Seven classes, logits falling from class 0 to 6: the label's place in the ranking is the label itself.
    falling = [70, 60, 50, 40, 30, 20, 10]
    data = write(tmp_path / "d.npz", [falling] * 7 + [falling[::-1]], [0, 1, 2, 3, 4, 5, 6, 6])
    found = evaluate(pixels(7), data, batch=3)
    assert list(found) == ["float", "simulated", "deployed"]
    assert found == {
        "float": Scores(top1=2 / 8, top5=6 / 8, agreement=None, sqnr_db=None, pictures=8),
        "simulated": None,
        "deployed": None,
    }


def test_top5_of_three_classes_counts_all(tmp_path: Path) -> None:
    data = write(tmp_path / "d.npz", [[9, 5, 1], [1, 5, 9]], [2, 2])
    assert evaluate(pixels(3), data)["float"] == Scores(0.5, 1.0, None, None, 2)


def test_agreement_and_sqnr_by_hand() -> None:
    tally = Tally()
    tally.update(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), reference=torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
    tally.update(torch.tensor([[5.0, 4.0]]), reference=torch.tensor([[4.0, 5.0]]))
    # signal 9 + 1 + 4 + 16 + 25, noise 1 + 1 + 1
    assert tally.scores() == Scores(None, None, 2 / 3, pytest.approx(10 * math.log10(55 / 3)), 3)


def test_batches_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, noise = torch.randn(2, 50, 9, generator=generator)
    labels = torch.randint(9, (50,), generator=generator)
    whole, parts = Tally(), Tally()
    whole.update(reference + 0.3 * noise, labels, reference)
    for piece in torch.arange(50).split(7):
        parts.update((reference + 0.3 * noise)[piece], labels[piece], reference[piece])
    assert parts.scores().to_dict() == whole.scores().to_dict()


@pytest.mark.parametrize(
    ("signal", "noise", "decibel"),
    [
        (100, 1, 20),
        (1, 0, 200),
        (0, 0, 200),
        (1, 1e-30, 200),
        (0, 1, -200),
        (1, math.inf, -200),
        (math.inf, 1, -200),
        (math.inf, math.inf, -200),
        (math.nan, 1, -200),
        (1, math.nan, -200),
    ],
)
def test_sqnr_is_always_a_number(signal: float, noise: float, decibel: float) -> None:
    assert sqnr(signal, noise) == pytest.approx(decibel)


def test_scores_are_json_with_six_digits() -> None:
    row = Scores(1 / 3, None, 2 / 3, 12.3456789, 3).to_dict()
    assert json.loads(json.dumps(row)) == {
        "top1": 0.333333,
        "top5": None,
        "agreement": 0.666667,
        "sqnr_db": 12.345679,
        "pictures": 3,
    }


def test_all_forms_are_scored_as_if_run_alone(tmp_path: Path) -> None:
    model, data = quantized(), pictures(tmp_path / "d.npz", labels=True)
    found = evaluate(model, data, batch=7)
    (item,) = open_dataset(data, "evaluation").batches(evaluation_preprocessing(model), 100)
    assert item.labels is not None
    export(model, tmp_path / "m.onnx")
    with torch.no_grad():
        logits = {"float": model.graph(item.images), "simulated": model.simulation()(item.images)}
    logits["deployed"] = evaluation.TARGETS["onnxruntime"].load(tmp_path / "m.onnx", 1).run(item.images)  # type: ignore[misc]
    for name, scores in found.items():
        assert scores is not None
        own, reference = logits[name], logits["float"]
        assert scores.pictures == 24
        assert scores.top1 == pytest.approx((own.argmax(1) == item.labels).double().mean().item())
        ranks = (own > own.gather(1, item.labels[:, None])).sum(1)
        assert scores.top5 == pytest.approx((ranks < 5).double().mean().item())
        if name == "float":
            assert (scores.agreement, scores.sqnr_db) == (None, None)
        else:
            assert scores.agreement == pytest.approx((own.argmax(1) == reference.argmax(1)).double().mean().item())
            noise = (own - reference).square().sum()
            assert scores.sqnr_db == pytest.approx(10 * torch.log10(reference.square().sum() / noise).item(), abs=1e-3)


def evaluation_preprocessing(model: QuantizedModel) -> evaluation.Preprocessing:
    return evaluation.Preprocessing.from_config(model.info["preprocessing"])


def test_unlabelled_pictures_give_agreement_and_sqnr(tmp_path: Path) -> None:
    found = evaluate(quantized(), pictures(tmp_path / "d.npz"), deployed=False)
    assert found["deployed"] is None
    float_, simulated = found["float"], found["simulated"]
    assert float_ is not None
    assert simulated is not None
    assert (float_.top1, float_.top5, simulated.top1, simulated.top5) == (None,) * 4
    assert simulated.agreement is not None
    assert simulated.sqnr_db is not None
    assert simulated.sqnr_db > 10


def test_the_saved_file_is_the_one_that_runs(tmp_path: Path) -> None:
    data = pictures(tmp_path / "d.npz")
    folder = save(quantized(), tmp_path / "out")
    assert evaluate(quantized(), data, folder=folder) == evaluate(quantized(), data)
    other = save(fresh(bits="w4a4"), tmp_path / "other")
    assert evaluate(quantized(), data, folder=other)["deployed"] != evaluate(quantized(), data)["deployed"]
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx is missing"):
        evaluate(quantized(), data, folder=folder)


def test_without_a_runtime_there_is_no_deployed_model(tmp_path: Path) -> None:
    found = evaluate(fresh(target="simulate"), pictures(tmp_path / "d.npz"))
    assert [name for name, scores in found.items() if scores is None] == ["deployed"]


def test_labels_are_checked_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(QuantizedModel, "simulation", run)
    data = tmp_path / "photos"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE)).save(data / name / "a.png")
    with pytest.raises(DataError, match=f"2 classes but the model has {CLASSES} outputs"):
        evaluate(quantized(), data)


def test_default_pictures_serve_without_their_labels() -> None:
    found = evaluate(quantized(), limit=3, deployed=False)["simulated"]
    assert found is not None
    assert (found.top1, found.pictures) == (None, 3)
    loaded = load_model(Tiny(), input_size=SIDE)
    with pytest.raises(DataError, match="photos"):
        evaluate(loaded, limit=3)


def test_a_limit_draws_from_all_classes_and_repeats_itself(tmp_path: Path) -> None:
    data = tmp_path / "photos"
    for label in range(4):
        (data / f"c{label}").mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (4, 4)).save(data / f"c{label}" / f"{i}.png")
    # all logits are equal, and the first of equals counts: only class 0 is right
    first, again = (evaluate(pixels(4), data, limit=20)["float"] for _ in range(2))
    assert first == again
    assert first is not None
    assert first.pictures == 20
    assert first.top1 is not None
    assert 0 < first.top1 < 0.5  # the first 20 in order would be half class 0


def test_skipped_pictures_reach_the_caller(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "d" / label).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "d" / label / "good.png")
    (tmp_path / "d" / "a" / "bad.png").write_bytes(b"no picture")
    dataset = open_dataset(tmp_path / "d", "evaluation")
    found = evaluate(pixels(2), dataset, limit=2)["float"]
    assert found is not None
    assert found.pictures == 2
    evaluate(pixels(2), dataset)
    assert list(dataset.skipped) == ["a/bad.png"]


def test_a_loaded_net_is_left_as_it_was(tmp_path: Path) -> None:
    class Caching(Pixels):
        seen: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return super().forward(x)

    model = pixels(3)
    model.module = caching = Caching(3)
    evaluate(model, write(tmp_path / "d.npz", [[1, 2, 3]]))
    assert caching.seen is None
