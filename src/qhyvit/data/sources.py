"""Where pictures lie: a folder, a zip archive, or an array file. Lists names first, reads one picture when asked."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from qhyvit.data.pictures import decode
from qhyvit.errors import DataError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm"),
)
MEMBER_LIMIT = 256 * 2**20
"""Bytes that one member of a zip archive may unpack to."""

Read = Callable[[str, int], Image.Image]
"""Name and the side that it will be resized to (see `decode`) → RGB picture; raises whatever makes it unreadable."""


@dataclass(frozen=True)
class Source:
    """Named pictures.

    Args:
        name: for messages.
        files: names in sorted order, "/" between folders.
        reading: gives `Read`; what it holds open is closed at its end. Safe to call from several threads.
        labels: (len(files),), only where the source itself stores them.
        classes: names of the stored labels, only where the source itself stores them.
    """

    name: str
    files: tuple[str, ...]
    reading: Callable[[], AbstractContextManager[Read]]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None


def from_folder(folder: Path) -> Source:
    """All pictures under a folder, links followed, hidden files and folders left out.

    Raises:
        DataError: if there is none.
    """
    files = _pictures(path.relative_to(folder).as_posix() for path in _walk(folder))

    def read(name: str, side: int) -> Image.Image:
        return decode(folder / name, side)

    return _not_empty(Source(str(folder), files, lambda: nullcontext(read)))


def from_zip(name: str, open_file: Callable[[], IO[bytes]]) -> Source:
    """All pictures in a zip archive; nothing is unpacked to disk.

    Raises:
        DataError: if the archive cannot be read or holds no picture.
    """
    try:
        with open_file() as file, zipfile.ZipFile(file) as archive:
            files = _pictures(info.filename for info in archive.infolist() if not info.is_dir())
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{name} cannot be read as a zip archive: {error}.") from error

    @contextmanager
    def reading() -> Iterator[Read]:
        lock = threading.Lock()  # the members share one file position
        with open_file() as file, zipfile.ZipFile(file) as archive:

            def read(member: str, side: int) -> Image.Image:
                info = archive.getinfo(member)
                if info.file_size > MEMBER_LIMIT:
                    raise ValueError(f"would unpack to {info.file_size:,} bytes, more than {MEMBER_LIMIT:,}")
                with lock, archive.open(info) as content:
                    # a bounded read: the member may hold more than its header says
                    data = content.read(info.file_size)
                return decode(data, side)

            yield read

    return _not_empty(Source(name, files, reading))


def from_npz(path: Path) -> Source:
    """An array file: `images` (N, H, W, 3) or (N, H, W) uint8; optionally `labels` (N,) integer and `classes` names.

    Without `classes` the labels are taken as indices of the model's outputs.

    Raises:
        DataError: if an array is missing or has the wrong shape, type or range.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("images", "labels", "classes") if key in file.files}
            found = ", ".join(file.files) or "none"
    except Exception as error:  # numpy raises half a dozen kinds for a damaged file
        raise DataError(f"{path} cannot be read as an array file without pickled objects: {error}.") from error
    if "images" not in arrays:
        raise DataError(f"{path} holds no array called 'images' (found: {found}).")
    images = arrays["images"]
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise DataError(
            f"{path}: 'images' is {images.dtype} {images.shape}; it must be uint8 (N, H, W, 3) or (N, H, W)."
        )
    if images.size == 0:
        raise DataError(f"{path}: 'images' is empty, of shape {images.shape}.")
    labels, classes = _stored_labels(path, len(images), arrays.get("labels"), arrays.get("classes"))
    files = tuple(f"images[{i}]" for i in range(len(images)))

    def read(name: str, side: int) -> Image.Image:
        return Image.fromarray(images[int(name[7:-1])]).convert("RGB")

    return Source(str(path), files, lambda: nullcontext(read), labels, classes)


def _stored_labels(
    path: Path, count: int, labels: np.ndarray | None, classes: np.ndarray | None
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    if labels is None:
        return None, None
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"{path}: 'labels' is {labels.dtype} {labels.shape}; it must be one integer for each of {count} pictures."
        )
    if classes is not None and (classes.ndim != 1 or classes.dtype.kind != "U"):
        raise DataError(f"{path}: 'classes' is {classes.dtype} {classes.shape}; it must be a list of names.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise DataError(f"{path}: 'labels' holds {low}; labels count from 0.")
    if classes is not None and high >= len(classes):
        raise DataError(f"{path}: 'labels' holds {high}, but 'classes' names only {len(classes)}.")
    return tuple(map(int, labels)), None if classes is None else tuple(map(str, classes))


def _walk(folder: Path) -> Iterator[Path]:
    """Files under a folder; a linked folder is entered once, so a loop of links ends."""
    seen: set[str] = set()
    for base, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(base, file) for file in files)


def _pictures(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are pictures, sorted and without hidden ones."""

    def shown(name: str) -> bool:
        return not any(
            part.startswith(".") or part == "__MACOSX" for part in name.split("/") if part not in (".", "..")
        )

    return tuple(sorted({name for name in names if name.lower().endswith(SUFFIXES) and shown(name)}))


def _not_empty(source: Source) -> Source:
    if not source.files:
        raise DataError(f"{source.name} holds no pictures; looked for {' '.join(SUFFIXES)} in it and its folders.")
    return source
