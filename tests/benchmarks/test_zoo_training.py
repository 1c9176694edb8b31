"""Training of the zoo's nets: pictures, schedule, and a run on a made-up archive that is stopped and goes on."""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[2] / "benchmarks" / "zoo"
sys.path.insert(0, str(FOLDER))

from output import stored  # noqa: E402
from pictures import augment, read_archives, squash  # noqa: E402
from schedule import Stage, read_stages  # noqa: E402
from teacher import soft_labels  # noqa: E402
from train import Trainer  # noqa: E402

from qhyvit.models import load_model  # noqa: E402

SIDE, CLASSES = 32, ("ant", "bee")


def archive(path: Path, count: int, seed: int) -> Path:
    """Two classes that differ in colour."""
    generator = torch.Generator().manual_seed(seed)
    with zipfile.ZipFile(path, "w") as file:
        for label, name in enumerate(CLASSES):
            for i in range(count):
                pixels = torch.randint(0, 120, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
                pixels[:, :, label] += 100
                data = io.BytesIO()
                Image.frombytes("RGB", (SIDE, SIDE), pixels.numpy().tobytes()).save(data, "PNG")
                file.writestr(f"{name}/{i}.png", data.getvalue())
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("train-0.zip", "train-1.zip", "val.zip")):
        archive(folder / name, 8, seed)
    return folder


def recipe(**changes: Any) -> dict[str, Any]:
    """A net that trains in a second."""
    return {
        "name": "tiny",
        "model": "test_efficientnet",
        "model_args": {"num_classes": len(CLASSES)},
        "train": ["train-0.zip", "train-1.zip"],
        "val": "val.zip",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "crop_pct": 1.0,
        "margin": 1.0,
        "augment": {"crop": "shifted", "pad": 2, "colour": 0.1},
        "batch": 8,
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
        "mixup": 0.2,
        "ema": 0.9,
        "seed": 0,
        "stages": [{"size": 24, "epochs": 2, "lr": 0.002}, {"size": 32, "epochs": 2, "lr": 0.002}],
        **changes,
    }


def arguments(data: Path, out: Path, resume: bool = False, minutes: float | None = None) -> argparse.Namespace:
    out.mkdir(exist_ok=True)
    return argparse.Namespace(data=data, out=out, resume=resume, minutes=minutes, threads=1)


class StoppedError(Exception):
    """As if the machine had gone down."""


def stop_after(trainer: Trainer, epoch: int) -> None:
    """Stop once the checkpoint of this epoch is written."""
    record = trainer.record

    def stopping(*given: Any) -> None:
        record(*given)
        if trainer.epoch == epoch:
            raise StoppedError

    trainer.record = stopping


# ---- a run


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_stopped_run_that_goes_on_gives_the_same_net(data: Path, tmp_path: Path, epoch: int) -> None:
    Trainer(recipe(), arguments(data, tmp_path / "whole")).run()
    trainer = Trainer(recipe(), arguments(data, tmp_path / "parts"))
    stop_after(trainer, epoch)
    with pytest.raises(StoppedError):
        trainer.run()
    assert not (tmp_path / "parts" / "tiny.safetensors").exists()
    Trainer(recipe(), arguments(data, tmp_path / "parts", resume=True)).run()
    whole, parts = (load_file(tmp_path / name / "tiny.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_weights_load_by_their_card(data: Path, tmp_path: Path) -> None:
    Trainer(recipe(), arguments(data, tmp_path)).run()
    card = json.loads((tmp_path / "tiny.json").read_text())
    loaded = load_model("test_efficientnet", weights=tmp_path / "tiny.safetensors")
    assert loaded.class_names == CLASSES
    assert loaded.preprocessing_config["input_size"] == (3, 32, 32)
    assert card["pictures_seen"] == 4 * 32
    history = json.loads((tmp_path / "tiny.history.json").read_text())
    assert [row["size"] for row in history] == [24, 24, 32, 32]
    assert [row["pictures"] for row in history] == [32, 64, 96, 128]


def test_a_run_that_begins_from_weights_begins_where_they_are(data: Path, tmp_path: Path) -> None:
    Trainer(recipe(), arguments(data, tmp_path)).run()
    (tmp_path / "tiny.safetensors").rename(data / "begin.safetensors")
    begun = Trainer(recipe(init="begin.safetensors"), arguments(data, tmp_path))
    held = load_file(data / "begin.safetensors")
    state = begun.model.state_dict()
    assert all(torch.equal(state[key], tensor.to(state[key].dtype)) for key, tensor in held.items())


def test_minutes_end_a_run_whatever_its_epochs(data: Path, tmp_path: Path) -> None:
    shares = [{"size": 24, "share": 0.5, "lr": 0.002}, {"size": 32, "share": 0.5, "lr": 0.002}]
    trainer = Trainer(recipe(stages=shares), arguments(data, tmp_path, minutes=1e-3))
    trainer.run()
    assert trainer.stage == 2
    assert (tmp_path / "tiny.safetensors").is_file()


def test_archives_of_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as file, zipfile.ZipFile(data / "val.zip") as val:
        file.writestr("cow/0.png", val.read("ant/0.png"))
    with pytest.raises(SystemExit, match="different classes"):
        Trainer(recipe(val=str(tmp_path / "odd.zip")), arguments(data, tmp_path))


# ---- weights as they are written


def test_vectors_are_not_rounded_and_matrices_are_fp16() -> None:
    state = {"norm": torch.tensor([1e6, 1e-9]), "weight": torch.randn(3, 4), "count": torch.tensor(70_000)}
    written = stored(state, half=True)
    assert torch.equal(written["norm"], state["norm"])
    assert written["weight"].dtype == torch.float16
    assert torch.equal(written["count"], state["count"])
    assert stored(state, half=False)["weight"].dtype == torch.float32


# ---- pictures


def test_labels_of_several_archives_are_of_one_list_of_classes(data: Path) -> None:
    both = read_archives([data / "train-0.zip", data / "train-1.zip"])
    assert both.classes == list(CLASSES)
    assert both.labels.tolist() == ([0] * 8 + [1] * 8) * 2
    brightest = squash(both.images, SIDE)[0].float().mean((2, 3)).argmax(1)
    assert torch.equal(brightest, both.labels)


@pytest.mark.parametrize("size", [8, 12])
def test_shifted_crops_are_windows_of_the_padded_picture_or_its_mirror_image(size: int) -> None:
    data, pad = torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8), 3
    settings = {"crop": "shifted", "pad": pad, "colour": 0.0}
    got = augment(data, torch.ones(20), size, settings, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(data.float() / 255, (pad,) * 4, mode="reflect")
    mirrored = 0
    for one, whole in zip(got, padded, strict=True):
        windows = whole.unfold(1, size, 1).unfold(2, size, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        found = [any(torch.allclose(one, w, atol=1e-5) for w in ws) for ws in (windows, windows.flip(-1))]
        assert any(found)
        mirrored += found[1]
    assert 0 < mirrored < 20


def test_resized_crops_are_of_the_size_asked_for_and_follow_the_generator() -> None:
    data, aspect = torch.randint(0, 256, (4, 3, 20, 20), dtype=torch.uint8), torch.tensor([1.0, 0.5, 2.0, 1.0])
    one, again, other = (augment(data, aspect, 16, {}, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one.shape == (4, 3, 16, 16)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# ---- soft labels


def test_soft_labels_are_the_mean_of_the_teachers_and_computed_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, name, cpu = read_archives([data / "val.zip"]).images, "zoo/mobilevit_xxs", torch.device("cpu")
    resized = [image.resize((64, 64)) for image in images]
    said = soft_labels([name], resized, cpu, tmp_path)
    loaded = load_model(name)
    normalised = (squash(resized, 64)[0] / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        both = [loaded.module(x).softmax(1) for x in (normalised, normalised.flip(-1))]
    assert torch.allclose(said, (both[0] + both[1]) / 2, atol=1e-3)
    monkeypatch.setattr("teacher.load_model", None)  # not built again
    assert torch.equal(soft_labels([name, name], resized, cpu, tmp_path), said)


# ---- schedule


def test_the_learning_rate_falls_from_its_first_to_its_last_value() -> None:
    stage = Stage(size=64, lr=0.1, lr_end=0.02, epochs=1)
    rates = [stage.rate(at / 10) for at in range(11)]
    assert math.isclose(rates[0], 0.1)
    assert math.isclose(rates[5], 0.06)
    assert math.isclose(rates[-1], 0.02)
    assert rates == sorted(rates, reverse=True)
    assert stage.rate(1.5) == rates[-1]


@pytest.mark.parametrize(
    ("stages", "minutes", "said"),
    [
        ([{"size": 8, "lr": 0.1}], None, "either epochs or a share"),
        ([{"size": 8, "lr": 0.1, "epochs": 1, "share": 1.0}], 1.0, "either epochs or a share"),
        ([{"size": 8, "lr": 0.1, "share": 1.0}], None, "give --minutes"),
        ([{"size": 8, "lr": 0.1, "share": 0.5}], 1.0, "add up to 1"),
    ],
)
def test_stages_that_do_not_say_how_long_are_refused(
    stages: list[dict[str, Any]], minutes: float | None, said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        read_stages({"name": "net", "stages": stages}, minutes)
