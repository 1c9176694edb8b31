"""Pictures with or without labels, read a batch at a time."""

from __future__ import annotations

import csv
import difflib
import io
import os
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from qhyvit.data.labels import class_of_each, imagenet_wnids, outputs_of
from qhyvit.data.preprocessing import Preprocessing
from qhyvit.data.sources import Source, from_folder, from_npz, from_zip
from qhyvit.errors import DataError

Part = Literal["calibration", "evaluation"]
BUILTIN = ("flowers", "photos")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures ready for a model.

    Args:
        images: float32 (n, 3, H, W).
        labels: int64 (n,), None if unlabelled.
        names: n names, as the source lists them.
    """

    images: Tensor
    labels: Tensor | None
    names: list[str]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Listed pictures; nothing is decoded before `batches`.

    Args:
        name: for messages.
        classes: names that the labels index; None: unlabelled.
        skipped: picture → why it was left out; grows while reading, shared with reordered and relabelled copies.
    """

    name: str
    classes: tuple[str, ...] | None
    skipped: dict[str, str] = field(default_factory=dict)
    _source: Source = field(kw_only=True, repr=False)
    _entries: tuple[tuple[str, int | None], ...] = field(kw_only=True, repr=False)
    _by_index: bool = field(default=False, kw_only=True, repr=False)  # labels are output indices without names

    @property
    def label_space(self) -> int | None:
        """Number of classes that the labels index; None: unlabelled."""
        return None if self.classes is None else len(self.classes)

    def __len__(self) -> int:
        """Number of listed pictures, unreadable ones among them."""
        return len(self._entries)

    def shuffled(self, seed: int) -> Dataset:
        """The same pictures in an order drawn from `seed`."""
        entries = list(self._entries)
        random.Random(seed).shuffle(entries)
        return replace(self, _entries=tuple(entries))

    def batches(self, preprocessing: Preprocessing, batch_size: int = 32, limit: int | None = None) -> Iterator[Batch]:
        """Stream the pictures in order; memory does not grow with their number.

        A few threads decode ahead. An unreadable picture is left out and entered in `skipped`.

        Args:
            preprocessing: what the model wants.
            batch_size: pictures in each batch; the last one may be smaller, none is empty.
            limit: number of readable pictures to stop after.

        Raises:
            DataError: if not a single picture could be read.
            ValueError: if `batch_size` or `limit` is below 1.
        """
        if batch_size < 1 or (limit is not None and limit < 1):
            raise ValueError(f"batch_size {batch_size} and limit {limit} must be at least 1")
        return self._stream(preprocessing, batch_size, limit)

    def _stream(self, preprocessing: Preprocessing, batch_size: int, limit: int | None) -> Iterator[Batch]:
        images: list[Tensor] = []
        entries: list[tuple[str, int | None]] = []
        count = 0
        with self._source.reading() as read:

            def load(entry: tuple[str, int | None]) -> Image.Image | str:
                try:
                    picture = read(entry[0], preprocessing.resized_side)
                except Exception as error:  # decoders of damaged files raise nearly anything
                    return str(error) or type(error).__name__
                return preprocessing.crop(picture)

            with closing(_ahead(load, self._entries)) as loaded:
                for entry, picture in loaded:
                    if isinstance(picture, str):
                        self.skipped[entry[0]] = picture
                        continue
                    # here and not in the threads, where torch would start a pool of its own for each
                    images.append(preprocessing.normalise(picture))
                    entries.append(entry)
                    count += 1
                    if len(images) == batch_size or count == limit:
                        yield _batch(images, entries)
                        images, entries = [], []
                    if count == limit:
                        return
        if images:
            yield _batch(images, entries)
        if count == 0:
            name, reason = next((n, self.skipped[n]) for n, _ in self._entries)
            raise DataError(
                f"None of the {len(self)} pictures of {self.name} can be read; the first, {name}: {reason}."
            )

    def check_labels(self, num_classes: int, class_names: Sequence[str] | None) -> Dataset:
        """The same pictures with labels that index a model's outputs; see `labels.outputs_of` for the rules.

        Labels of an array file without class names are output indices already. An unlabelled set stays so.

        Args:
            num_classes: number of the model's outputs.
            class_names: their names, if known.

        Raises:
            DataError: if labels and outputs cannot be brought together.
        """
        if self.classes is None:
            return self
        labels = {label for _, label in self._entries if label is not None}
        if self._by_index:
            if len(self.classes) > num_classes:
                raise DataError(f"{self.name} has label {max(labels)} but the model has only {num_classes} outputs.")
            names = tuple(class_names or map(str, range(num_classes)))
            return replace(self, classes=names)
        used = {self.classes[label] for label in labels}
        outputs, names = outputs_of(self.classes, used, num_classes, class_names, self.name)
        return replace(
            self,
            classes=names,
            _entries=tuple((name, None if label is None else outputs[label]) for name, label in self._entries),
        )


def open_dataset(source: str | Path, part: Part) -> Dataset:
    """List the pictures of a folder, a zip archive, an array file or a built-in set.

    Folders and archives: the first folder below the one that all pictures share names the class; pictures outside of
    folders make the set unlabelled. If that level is exactly `calibration/` and `evaluation/`, `part` chooses.
    `.npz`: see `sources.from_npz`. Built in are "flowers" (5 classes) and "photos" (labelled with ImageNet-1k indices),
    each with disjoint parts; a file or folder of that name comes first (`open_builtin` passes it over).

    Raises:
        DataError: if there is no such source, or no picture in it.
    """
    path = Path(source)
    if path.is_dir():
        return _of_files(from_folder(path), part)
    if path.is_file():
        return _of_file(path, part)
    if str(source) in BUILTIN:
        return open_builtin(str(source), part)
    near = difflib.get_close_matches(str(source), BUILTIN, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise DataError(f"No folder, .zip or .npz lies at {source}; built in are {' and '.join(BUILTIN)}.{hint}")


def open_builtin(name: str, part: Part) -> Dataset:
    """One part of a set of `BUILTIN`, whatever files lie around.

    Raises:
        DataError: if there is no such set.
    """
    _known(name)
    file = _builtin(f"{name}.zip")
    source = from_zip(f"{name} (built in)", lambda: file.open("rb"))
    dataset = replace(_of_files(source, part), name=f"{name} (built in, {part})")
    return dataset.check_labels(1000, imagenet_wnids()) if name == "photos" else dataset


def builtin_credits(name: str) -> list[dict[str, str]]:
    """Who made the pictures of a built-in set: one row a picture, among its keys file, part, photo_page, license.

    Raises:
        DataError: if there is no such set.
    """
    _known(name)
    text = _builtin(f"{name}_credits.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def _known(name: str) -> None:
    if name not in BUILTIN:
        raise DataError(f"No built-in data set is called {name!r}; there are {' and '.join(BUILTIN)}.")


def _builtin(file: str) -> Traversable:
    return files("qhyvit.data").joinpath("builtin", file)


def _of_file(path: Path, part: Part) -> Dataset:
    if path.suffix.lower() == ".npz":
        return _of_arrays(from_npz(path))
    if path.suffix.lower() == ".zip":
        return _of_files(from_zip(str(path), lambda: path.open("rb")), part)
    raise DataError(f"{path} is neither a folder nor a .zip or .npz; to use one picture, give the folder it lies in.")


def _of_files(source: Source, part: Part) -> Dataset:
    """Classes from folder names, sorted."""
    found = class_of_each(source.files, part)
    names = {name for name in found.values() if name is not None}
    classes = tuple(sorted(names)) if names else None
    at = {name: i for i, name in enumerate(classes or ())}
    entries = tuple((file, None if name is None else at[name]) for file, name in found.items())
    return Dataset(source.name, classes, _source=source, _entries=entries)


def _of_arrays(source: Source) -> Dataset:
    labels = source.labels
    if labels is None:
        return Dataset(source.name, None, _source=source, _entries=tuple((name, None) for name in source.files))
    classes = source.classes or tuple(str(i) for i in range(max(labels) + 1))
    entries = tuple(zip(source.files, labels, strict=True))
    return Dataset(source.name, classes, _source=source, _entries=entries, _by_index=source.classes is None)


def _batch(images: list[Tensor], entries: list[tuple[str, int | None]]) -> Batch:
    labels = [label for _, label in entries if label is not None]
    return Batch(
        torch.stack(images),
        torch.tensor(labels, dtype=torch.int64) if labels else None,
        [name for name, _ in entries],
    )


def _ahead(work: Callable[[T], R], items: Iterable[T]) -> Generator[tuple[T, R], None, None]:
    """Each item with its result, in order; a few threads work a bounded number of items ahead."""
    workers = min(4, os.cpu_count() or 1)
    pending: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) > 2 * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            for _, future in pending:
                future.cancel()
