"""The pictures that ship with the package."""

from __future__ import annotations

import os
import sys
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from qhyvit.data import BUILTIN, Dataset, Preprocessing, builtin_credits, open_builtin, open_dataset
from qhyvit.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "zoo"))
import package_pictures


def listing(dataset: Dataset) -> dict[str, int]:
    return {name: label for name, label in dataset._entries if label is not None}


@pytest.mark.parametrize("name", BUILTIN)
def test_parts_are_disjoint_and_every_picture_has_its_credit(name: str) -> None:
    shipped = {part: set(listing(open_dataset(name, part))) for part in ("calibration", "evaluation")}
    rows = builtin_credits(name)
    for part, pictures in shipped.items():
        assert {row["file"] for row in rows if row["part"] == part} == pictures
    originals = [file.split("/", 1)[1] for pictures in shipped.values() for file in pictures]
    assert len(originals) == len(set(originals)) == len(rows)
    for row in rows:
        assert row["photo_page"].startswith(("https://", "http://"))
        assert row["license_url"] == "https://creativecommons.org/licenses/by/2.0/"
        assert row["changes"]


def test_flowers(plain: Preprocessing) -> None:
    calibration, evaluation = open_dataset("flowers", "calibration"), open_dataset("flowers", "evaluation")
    assert (len(calibration), len(evaluation)) == (256, 736)
    assert calibration.classes == evaluation.classes == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    share = [Counter(listing(d).values()) for d in (calibration, evaluation)]
    assert all(abs(share[0][c] / 256 - share[1][c] / 736) < 0.01 for c in range(5))
    batch = next(evaluation.shuffled(0).batches(plain, batch_size=16))
    assert [n.split("/")[1] for n in batch.names] == [evaluation.classes[i] for i in batch.labels]
    assert evaluation.skipped == {}
    assert all(row["photo_page"].split("id=")[1] in row["file"] for row in builtin_credits("flowers"))


def test_photos(plain: Preprocessing) -> None:
    calibration, evaluation = open_dataset("photos", "calibration"), open_dataset("photos", "evaluation")
    assert (len(calibration), len(evaluation)) == (500, 500)
    assert calibration.label_space == evaluation.label_space == 1000
    truth = {row["file"]: int(row["class_index"]) for row in builtin_credits("photos")}
    assert listing(calibration) | listing(evaluation) == truth
    halves = [Counter(listing(d).values()) for d in (calibration, evaluation)]
    assert all(abs(halves[0][c] - halves[1][c]) <= 1 for c in set(truth.values()))
    assert next(evaluation.check_labels(1000, None).batches(plain, limit=4)).labels is not None
    with pytest.raises(DataError, match="1000 classes but the model has 5"):
        evaluation.check_labels(5, None)
    assert all(row["author"] and row["author_page"] for row in builtin_credits("photos"))


@pytest.mark.parametrize("name", BUILTIN)
def test_every_picture_can_be_read(name: str, plain: Preprocessing) -> None:
    for part in ("calibration", "evaluation"):
        dataset = open_builtin(name, part)
        assert sum(len(batch.names) for batch in dataset.batches(plain, batch_size=100)) == len(dataset)


def test_size_stays_small() -> None:
    folder = files("qhyvit.data").joinpath("builtin")
    assert len(folder.joinpath("flowers.zip").read_bytes()) <= 5_000_000
    assert len(folder.joinpath("photos.zip").read_bytes()) <= 10_000_000


def test_folder_of_the_same_name_comes_first(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree.parent)
    os.rename(tree, tree.parent / "photos")
    assert len(open_dataset("photos", "calibration")) == 12
    assert len(open_builtin("photos", "calibration")) == 500


def test_unknown_builtin() -> None:
    for use in (lambda: open_builtin("cats", "calibration"), lambda: builtin_credits("cats")):
        with pytest.raises(DataError, match="cats"):
            use()


def test_packaging_draws_are_stratified_and_repeat() -> None:
    groups = {
        "a": [f"a/{i}" for i in range(50)],
        "b": [f"b/{i}" for i in range(30)],
        "c": [f"c/{i}" for i in range(21)],
    }
    drawn = [package_pictures.stratified(groups, 10, package_pictures.random.Random(0)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert Counter(name[0] for name in drawn[0]) == {"a": 5, "b": 3, "c": 2}
    parts = package_pictures.halves(groups, package_pictures.random.Random(0))
    assert Counter(parts.values()) == {"calibration": 51, "evaluation": 50}
    assert abs(sum(1 if part == "calibration" else -1 for name, part in parts.items() if name[0] == "c")) == 1


def test_packaged_archive_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    members = {"evaluation/b.jpg": b"2", "calibration/a.jpg": b"1"}
    for name in ("one.zip", "two.zip"):
        package_pictures.write_archive(tmp_path / name, dict(reversed(members.items())), 1000)
        members = dict(reversed(members.items()))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with pytest.raises(SystemExit, match="more than"):
        package_pictures.write_archive(tmp_path / "three.zip", members, 10)


def test_central_square_is_what_a_centre_crop_sees(noise: object, plain: Preprocessing) -> None:
    picture = noise(5, (200, 144))  # type: ignore[operator]
    square = package_pictures.central_square(picture, 144)
    assert square.size == (144, 144)
    assert torch.equal(plain(square), plain(picture.crop((28, 0, 172, 144))))
