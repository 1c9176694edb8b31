"""Reading a folder, a zip or an array file a batch at a time."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qhyvit.data import Batch, Dataset, Preprocessing, open_dataset
from qhyvit.data import sources as sources_module
from qhyvit.errors import DataError


def together(batches: list[Batch]) -> tuple[torch.Tensor, list[int] | None, list[str]]:
    labels = None if batches[0].labels is None else [int(x) for b in batches for x in b.labels]
    return torch.cat([b.images for b in batches]), labels, [n for b in batches for n in b.names]


def read(dataset: Dataset, plain: Preprocessing, **options: int) -> tuple[torch.Tensor, list[int] | None, list[str]]:
    return together(list(dataset.batches(plain, **options)))


def test_folder_of_class_folders(tree: Path, plain: Preprocessing) -> None:
    dataset = open_dataset(tree, "evaluation")
    assert (dataset.classes, dataset.label_space, len(dataset)) == (("ant", "bee", "cat"), 3, 12)
    batches = list(dataset.batches(plain, batch_size=5))
    assert [len(b.names) for b in batches] == [5, 5, 2]
    assert batches[0].images.shape == (5, 3, 32, 32)
    assert batches[0].images.dtype == torch.float32
    images, labels, names = together(batches)
    assert labels == [0] * 4 + [1] * 3 + [2] * 5
    assert names == sorted(names)
    assert torch.equal(images[5], plain(Image.open(tree / names[5])))
    assert dataset.skipped == {}


@pytest.mark.parametrize("prefix", ["", "wrapper/"])
def test_zip_equals_folder(tree: Path, zipped: Callable[..., Path], plain: Preprocessing, prefix: str) -> None:
    folder, archive = open_dataset(tree, "evaluation"), open_dataset(str(zipped(tree, prefix)), "evaluation")
    assert archive.classes == folder.classes
    (x, y, names), (zx, zy, znames) = read(folder, plain), read(archive, plain)
    assert torch.equal(x, zx)
    assert y == zy
    assert [prefix + n for n in names] == znames


def test_flat_folder_and_pictures_outside_of_class_folders_are_unlabelled(tree: Path, plain: Preprocessing) -> None:
    for dataset in (open_dataset(tree / "ant", "calibration"), open_dataset(_with_loose_picture(tree), "calibration")):
        assert dataset.classes is None
        assert dataset.label_space is None
        assert next(dataset.batches(plain)).labels is None
    assert len(dataset) == 13


def _with_loose_picture(tree: Path) -> Path:
    shutil.copy(tree / "ant" / "0.JPG", tree / "cover.jpg")
    return tree


def test_folder_with_both_parts(tree: Path, tmp_path: Path, plain: Preprocessing) -> None:
    both = tmp_path / "both"
    shutil.copytree(tree / "ant", both / "calibration" / "ant")
    shutil.copytree(tree / "bee", both / "calibration" / "bee")
    shutil.copytree(tree / "cat", both / "evaluation")
    assert open_dataset(both, "calibration").classes == ("ant", "bee")
    evaluation = open_dataset(both, "evaluation")
    assert evaluation.classes is None
    assert len(evaluation) == 5


def test_deeper_folders_take_the_class_above(tmp_path: Path, noise: Callable[..., Image.Image]) -> None:
    for name in ("n01/images/a.png", "n02/images/b.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        noise(0).save(tmp_path / name)
    assert open_dataset(tmp_path, "evaluation").classes == ("n01", "n02")


def test_loop_of_links_ends(tree: Path) -> None:
    (tree / "ant" / "loop").symlink_to(tree, target_is_directory=True)
    assert len(open_dataset(tree, "calibration")) == 12


def test_truncated_and_huge_pictures_are_skipped_by_name(tree: Path, plain: Preprocessing) -> None:
    whole, _, _ = read(open_dataset(tree, "evaluation"), plain)
    data = (tree / "bee" / "0.JPG").read_bytes()
    (tree / "bee" / "0.JPG").write_bytes(data[: len(data) // 2])
    Image.new("P", (9_000, 8_000)).save(tree / "cat" / "1.png")
    dataset = open_dataset(tree, "evaluation")
    images, labels, names = read(dataset, plain, batch_size=4)
    assert set(dataset.skipped) == {"bee/0.JPG", "cat/1.png"}
    assert "truncated" in dataset.skipped["bee/0.JPG"].lower()
    assert "9000×8000" in dataset.skipped["cat/1.png"]
    assert torch.equal(images, whole[[i for i in range(12) if i not in (4, 8)]])
    assert labels == [0] * 4 + [1] * 2 + [2] * 4
    assert len(names) == 10
    assert len(dataset) == 12


def test_limit_counts_readable_pictures(tree: Path, plain: Preprocessing) -> None:
    (tree / "ant" / "1.png").write_bytes(b"broken")
    dataset = open_dataset(tree, "calibration")
    assert [len(b.names) for b in dataset.batches(plain, batch_size=3, limit=5)] == [3, 2]
    _, _, names = read(dataset, plain, limit=3)
    assert names == ["ant/0.JPG", "ant/2.JPG", "ant/3.png"]
    assert [len(b.names) for b in dataset.batches(plain, batch_size=3, limit=3)] == [3]
    assert len(read(dataset, plain, limit=1000)[2]) == 11


def test_no_readable_picture_is_an_error(tree: Path, plain: Preprocessing) -> None:
    for file in (tree / "ant").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"None of the 4 pictures .*0\.JPG"):
        list(open_dataset(tree / "ant", "calibration").batches(plain))


def test_shuffled_is_reproducible_and_keeps_labels_with_pictures(tree: Path, plain: Preprocessing) -> None:
    dataset = open_dataset(tree, "calibration")
    images, labels, names = read(dataset, plain)
    again = [read(dataset.shuffled(7), plain, batch_size=5) for _ in range(2)]
    assert again[0][2] == again[1][2] != names
    assert sorted(again[0][2]) == names
    assert again[0][2] != read(dataset.shuffled(8), plain)[2]
    back = [again[0][2].index(n) for n in names]
    assert torch.equal(again[0][0][back], images)
    assert [again[0][1][i] for i in back] == labels
    assert read(dataset, plain)[2] == names


def test_order_of_shuffled_never_changes(tree: Path, plain: Preprocessing) -> None:
    """A recipe's seed must mean the same pictures in every release."""
    names = read(open_dataset(tree, "calibration").shuffled(0), plain)[2]
    assert names[:3] == ["ant/1.png", "cat/2.JPG", "cat/1.png"]


def test_reading_stops_ahead_of_the_end(tree: Path, plain: Preprocessing, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(60):
        shutil.copy(tree / "ant" / "0.JPG", tree / "ant" / f"more{i}.jpg")
    opened: list[str] = []
    decode = sources_module.decode
    monkeypatch.setattr(sources_module, "decode", lambda data, side: opened.append(str(data)) or decode(data, side))
    stream = open_dataset(tree, "calibration").batches(plain, batch_size=2)
    next(stream)
    stream.close()
    assert len(opened) <= 2 + 9  # the batch, and twice the four threads (and one) ahead
    assert len(read(open_dataset(tree, "calibration"), plain, limit=4)[2]) == 4


def test_empty_sources_and_unknown_ones(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"empty holds no pictures"):
        open_dataset(tmp_path / "empty", "calibration")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(DataError, match=r"empty.zip holds no pictures"):
        open_dataset(tmp_path / "empty.zip", "calibration")
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"broken.zip cannot be read as a zip"):
        open_dataset(tmp_path / "broken.zip", "calibration")
    with pytest.raises(DataError, match="Did you mean 'flowers'"):
        open_dataset("flower", "calibration")
    with pytest.raises(DataError, match="give the folder"):
        open_dataset(tmp_path / "empty" / "notes.txt", "calibration")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"limit": 0}])
def test_sizes_below_one(tree: Path, plain: Preprocessing, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        open_dataset(tree, "calibration").batches(plain, **options)


def test_zip_member_of_absurd_size_is_skipped(
    tree: Path, zipped: Callable[..., Path], plain: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(tree / "cat/big.png")
    monkeypatch.setattr(sources_module, "MEMBER_LIMIT", 50_000)
    dataset = open_dataset(zipped(tree), "calibration")
    assert len(read(dataset, plain)[2]) == 12
    assert "would unpack to" in dataset.skipped["cat/big.png"]


def test_damaged_zip_member_is_skipped(tree: Path, zipped: Callable[..., Path], plain: Preprocessing) -> None:
    path = zipped(tree)
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("cat/4.JPG").header_offset + 120
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    dataset = open_dataset(path, "calibration")
    assert len(read(dataset, plain)[2]) == 11
    assert set(dataset.skipped) == {"cat/4.JPG"}


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    def save(**arrays: np.ndarray) -> Path:
        np.savez(tmp_path / "set.npz", **arrays)
        return tmp_path / "set.npz"

    return save


def test_npz_without_labels(npz: Callable[..., Path], plain: Preprocessing) -> None:
    dataset = open_dataset(npz(images=IMAGES), "calibration")
    assert (len(dataset), dataset.classes) == (5, None)
    images, labels, names = read(dataset.shuffled(1), plain)
    assert labels is None
    back = [names.index(f"images[{i}]") for i in range(5)]
    assert torch.equal(images[back], torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255)
    gray, _, _ = read(open_dataset(npz(images=IMAGES[..., 0]), "calibration"), plain)
    assert torch.equal(gray[:, 1], torch.from_numpy(IMAGES[..., 0]).float() / 255)


def test_npz_with_labels(npz: Callable[..., Path], plain: Preprocessing) -> None:
    dataset = open_dataset(npz(images=IMAGES, labels=np.array([2, 0, 1, 1, 0], np.uint8)), "evaluation")
    assert dataset.label_space == 3
    assert read(dataset.check_labels(10, None), plain)[1] == [2, 0, 1, 1, 0]
    assert dataset.check_labels(10, None).label_space == 10
    with pytest.raises(DataError, match="label 2 but the model has only 2"):
        dataset.check_labels(2, None)


def test_npz_with_class_names(npz: Callable[..., Path], plain: Preprocessing) -> None:
    path = npz(images=IMAGES, labels=np.array([1, 0, 1, 1, 0]), classes=np.array(["bee", "ant"]))
    dataset = open_dataset(path, "evaluation").check_labels(3, ["ant", "bee", "cat"])
    assert read(dataset, plain)[1] == [0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": IMAGES}, "no array called 'images'"),
        ({"images": IMAGES.astype(np.float32)}, "must be uint8"),
        ({"images": IMAGES[0, 0]}, "must be uint8"),
        ({"images": IMAGES[..., :2]}, "must be uint8"),
        ({"images": IMAGES[:0]}, "empty"),
        ({"images": IMAGES, "labels": np.arange(4)}, "one integer for each of 5"),
        ({"images": IMAGES, "labels": np.zeros(5)}, "one integer for each of 5"),
        ({"images": IMAGES, "labels": np.array([0, 1, -1, 0, 0])}, "holds -1"),
        ({"images": IMAGES, "labels": np.arange(5), "classes": np.array(["a", "b"])}, "names only 2"),
        ({"images": IMAGES, "labels": np.arange(5), "classes": np.arange(5)}, "list of names"),
    ],
)
def test_bad_npz(npz: Callable[..., Path], arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(npz(**arrays), "evaluation")


def test_npz_with_pickled_objects_is_refused(npz: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="without pickled objects"):
        open_dataset(npz(images=np.array([object()])), "evaluation")
