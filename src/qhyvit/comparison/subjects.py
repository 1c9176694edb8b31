"""What the cells of a comparison share, made once and laid down in a folder that all processes read.

A captured graph and the float logits for each net and each twin; pictures decoded once for all that see the same ones.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qhyvit._tensors import pack, unpack
from qhyvit.comparison.grid import UNSTRESSED
from qhyvit.data.dataset import Batch, Dataset, open_dataset
from qhyvit.data.preprocessing import Preprocessing
from qhyvit.errors import DataError
from qhyvit.evaluation import runner, stream
from qhyvit.graph.capture import capture
from qhyvit.graph.serialise import from_json, to_json
from qhyvit.models.load import LoadedModel, stressed
from qhyvit.pipeline import default_data
from qhyvit.recipe import Recipe

BATCH = 32  # evaluation pictures at a time


@dataclass(frozen=True)
class Subject:
    """A net or twin as it lies in a folder.

    Attributes:
        model: with its captured graph as module.
        images: evaluation pictures (n, 3, H, W), float32.
        labels: (n,) int64, or None.
        logits: (n, classes) of the float graph.
    """

    model: LoadedModel
    images: Tensor
    labels: Tensor | None
    logits: Tensor


def captured(loaded: LoadedModel) -> LoadedModel:
    """The same net as a captured graph.

    Raises:
        CaptureError: if it cannot be captured.
    """
    size = Preprocessing.from_config(loaded.preprocessing_config).input_size
    return replace(loaded, module=capture(loaded.module, torch.zeros(1, *size)))


def evaluation_data(loaded: LoadedModel, data: str | Path | Dataset | None) -> tuple[Dataset, bool]:
    """Pictures to score on, and whether their labels index the model's outputs; the default ones need not.

    Raises:
        DataError: if there are none, or pictures that were asked for have other labels.
    """
    opened = _opened(loaded, data, None, "evaluation")
    try:
        return opened.check_labels(loaded.num_classes, loaded.class_names), True
    except DataError:
        if data is not None:
            raise
        return opened, False


def calibration_data(loaded: LoadedModel, data: str | Path | Dataset | None, recipe: Recipe) -> Dataset:
    """Pictures to calibrate with, before any are drawn; chosen as `quantize` does.

    Raises:
        DataError: if there are none.
    """
    return _opened(loaded, data, recipe.calibration.source, "calibration")


def _opened(loaded: LoadedModel, data: str | Path | Dataset | None, other: str | None, part: Any) -> Dataset:
    given = other if data is None else data
    if given is None:
        return default_data(loaded, part)
    return given if isinstance(given, Dataset) else open_dataset(given, part)


class Shared:
    """Makes what is shared, each thing when it is first asked for.

    Args:
        folder: empty, for as long as the cells run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path] = {}

    def _once(self, key: Any, make: Callable[[Path], None]) -> Path:
        text = repr(key)
        if text not in self._made:
            path = Path(tempfile.mkdtemp(dir=self._folder))  # not by a number: one that failed stays behind
            make(path)
            self._made[text] = path
        return self._made[text]

    def calibration(self, loaded: LoadedModel, dataset: Dataset, recipe: Recipe) -> Path:
        """Pictures of one draw, as `quantize` would read them."""
        preprocessing = Preprocessing.from_config(loaded.preprocessing_config)
        size, seed = recipe.calibration.size, recipe.seed

        def make(path: Path) -> None:
            _write_pictures(path, dataset.shuffled(seed).batches(preprocessing, BATCH, size), min(size, len(dataset)))

        return self._once(("calibration", dataset.name, preprocessing, size, seed), make)

    def evaluation(self, loaded: LoadedModel, dataset: Dataset, labelled: bool, limit: int | None) -> Path:
        """Pictures to score on, with labels if they fit."""
        preprocessing = Preprocessing.from_config(loaded.preprocessing_config)

        def make(path: Path) -> None:
            batches = stream(loaded, dataset, f"Reading {dataset.name}", limit, BATCH)
            _write_pictures(path, batches, min(limit or len(dataset), len(dataset)), labels=labelled)

        classes = (loaded.num_classes, loaded.class_names, labelled)
        return self._once(("evaluation", dataset.name, preprocessing, limit, classes), make)

    def subject(self, label: str, loaded: LoadedModel, stress: str, pictures: Path) -> Path:
        """A net or twin with its float logits.

        Raises:
            QhyvitError: if it cannot be stressed so.
        """

        def make(path: Path) -> None:
            model = loaded if stress == UNSTRESSED else stressed(loaded, stress)
            _write_subject(path, model, pictures)

        return self._once(("subject", label, stress, str(pictures)), make)


def _write_pictures(path: Path, batches: Iterator[Batch], count: int, *, labels: bool = False) -> None:
    """Preprocessed pictures as an array file that is read in part; never all of them in memory."""
    file, found, read = None, [], 0
    for batch in batches:
        if file is None:
            shape = (count, *batch.images.shape[1:])
            file = np.lib.format.open_memmap(path / "images.npy", mode="w+", dtype=np.float32, shape=shape)
        file[read : read + len(batch.images)] = batch.images.numpy()
        read += len(batch.images)
        if labels and batch.labels is not None:
            found.append(batch.labels.numpy())
    assert file is not None  # a data set without a readable picture raises
    file.flush()
    (path / "pictures.json").write_text(json.dumps({"read": read}))
    if found:
        np.save(path / "labels.npy", np.concatenate(found))


def _write_subject(path: Path, model: LoadedModel, pictures: Path) -> None:
    graph = model.module
    assert isinstance(graph, fx.GraphModule)
    packed, strides = pack(dict(graph.named_buffers(recurse=False)))
    (path / "graph.safetensors").write_bytes(packed)
    (path / "graph.json").write_text(json.dumps([to_json(graph), strides]))
    run, images = runner(graph), read_pictures(pictures)
    with torch.no_grad():
        logits = [run(batch) for batch in torch.split(images, BATCH)]
    np.save(path / "logits.npy", torch.cat(logits).numpy())
    facts = {k: v for k, v in vars(model).items() if k != "module"}
    (path / "model.json").write_text(json.dumps([facts, str(pictures)], default=str))


def read_pictures(path: Path) -> Tensor:
    """Pictures (n, 3, H, W), read from disk when they are used."""
    read = json.loads((path / "pictures.json").read_text())["read"]
    return torch.from_numpy(np.load(path / "images.npy", mmap_mode="c")[:read])


@lru_cache(maxsize=2)
def read_subject(path: Path) -> Subject:
    """A net or twin; kept, because a process mostly runs several cells of one."""
    facts, pictures = json.loads((path / "model.json").read_text())
    described, strides = json.loads((path / "graph.json").read_text())
    graph = from_json(described, unpack((path / "graph.safetensors").read_bytes(), strides))
    facts["class_names"] = tuple(facts["class_names"]) if facts["class_names"] else None
    labels = Path(pictures) / "labels.npy"
    return Subject(
        LoadedModel(module=graph, **facts),
        read_pictures(Path(pictures)),
        torch.from_numpy(np.load(labels)) if labels.is_file() else None,
        torch.from_numpy(np.load(path / "logits.npy")),
    )
