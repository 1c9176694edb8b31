"""Which output of the model a label means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qhyvit.data import Dataset, Preprocessing, open_dataset
from qhyvit.data.labels import imagenet_wnids
from qhyvit.errors import DataError


@pytest.fixture
def folders(tmp_path: Path, noise: Callable[..., Image.Image]) -> Callable[..., Dataset]:
    def make(*classes: str) -> Dataset:
        for i, name in enumerate(classes):
            (tmp_path / "set" / name).mkdir(parents=True)
            noise(i).save(tmp_path / "set" / name / "0.png")
        return open_dataset(tmp_path / "set", "evaluation")

    return make


def labels(dataset: Dataset, plain: Preprocessing) -> dict[str, int]:
    """Class folder → label."""
    batches = list(dataset.batches(plain))
    return {n.split("/")[0]: int(y) for b in batches for n, y in zip(b.names, b.labels, strict=True)}


def test_by_name_even_if_the_model_has_more_classes_in_another_order(
    folders: Callable[..., Dataset], plain: Preprocessing
) -> None:
    dataset = folders("ant", "cat").check_labels(4, ["dog", "cat", "bee", "ant"])
    assert labels(dataset, plain) == {"ant": 3, "cat": 1}
    assert dataset.classes == ("dog", "cat", "bee", "ant")
    assert dataset.label_space == 4


def test_name_goes_before_the_number_of_classes(folders: Callable[..., Dataset], plain: Preprocessing) -> None:
    dataset = folders("ant", "bee").check_labels(2, ["bee", "ant"])
    assert labels(dataset, plain) == {"ant": 1, "bee": 0}


def test_wordnet_ids_are_imagenet_indices(folders: Callable[..., Dataset], plain: Preprocessing) -> None:
    dataset = folders("n01443537", "n01440764", "n15075141")
    expected = {"n01440764": 0, "n01443537": 1, "n15075141": 999}  # tench, goldfish, toilet tissue
    assert labels(dataset.check_labels(1000, None), plain) == expected
    assert labels(dataset.check_labels(1000, [f"class {i}" for i in range(1000)]), plain) == expected
    assert dataset.check_labels(1000, None).label_space == 1000
    tiny = dataset.check_labels(4, ["n15075141", "n01443537", "n01440764", "n09999999"])
    assert labels(tiny, plain) == {"n15075141": 0, "n01443537": 1, "n01440764": 2}
    with pytest.raises(DataError, match=r"3 classes but the model has 200 outputs"):
        dataset.check_labels(200, None)


def test_equal_numbers_are_taken_as_they_are(folders: Callable[..., Dataset], plain: Preprocessing) -> None:
    dataset = folders("ant", "bee", "cat")
    assert labels(dataset.check_labels(3, None), plain) == {"ant": 0, "bee": 1, "cat": 2}
    assert labels(dataset.check_labels(3, ["x", "y", "z"]), plain) == {"ant": 0, "bee": 1, "cat": 2}


def test_what_does_not_fit_names_both_counts(folders: Callable[..., Dataset]) -> None:
    dataset = folders("ant", "bee", "cat")
    with pytest.raises(DataError, match=r"3 classes but the model has 1000 outputs"):
        dataset.check_labels(1000, None)
    with pytest.raises(DataError, match=r"3 classes but the model has 4 outputs and knows no class 'bee'"):
        dataset.check_labels(4, ["ant", "cat", "dog", "eel"])


def test_name_that_stands_for_two_outputs_is_refused(folders: Callable[..., Dataset]) -> None:
    dataset = folders("ant", "crane")
    with pytest.raises(DataError, match=r"'crane'.* several"):
        dataset.check_labels(4, ["crane", "ant", "bee", "crane"])
    assert dataset.check_labels(4, ["crane", "ant", "bee", "bee"]).label_space == 4


def test_unlabelled_stays_unlabelled(folders: Callable[..., Dataset]) -> None:
    dataset = folders("ant").check_labels(1000, None)
    assert dataset.classes is None


def test_wordnet_ids_are_in_the_order_of_imagenet() -> None:
    assert len(set(imagenet_wnids())) == 1000
    assert list(imagenet_wnids()) == sorted(imagenet_wnids())
