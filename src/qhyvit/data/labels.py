"""What a picture's label is, and which of a model's outputs it means."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import PurePosixPath

from qhyvit.errors import DataError

PARTS = ("calibration", "evaluation")


@lru_cache(maxsize=1)
def imagenet_wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ImageNet-1k, at the index that ImageNet-trained nets give them."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def class_of_each(files: Sequence[str], part: str) -> dict[str, str | None]:
    """Class name of each picture of one part, from the folder that it lies in.

    Folders that all pictures share are passed over. If what remains begins with exactly the two folders `PARTS`, only
    those of `part` are taken. The class is then the first folder; where a picture lies in none, none has a class.
    """
    below = _below_common(files)
    if {path.parts[0] for path in below.values()} == set(PARTS):
        below = _below_common([file for file, path in below.items() if path.parts[0] == part])
    if any(len(path.parts) == 1 for path in below.values()):
        return dict.fromkeys(below)
    return {file: path.parts[0] for file, path in below.items()}


def _below_common(files: Sequence[str]) -> dict[str, PurePosixPath]:
    """Each file's path below the deepest folder that holds all of them."""
    paths = {file: PurePosixPath(file) for file in files}
    folders = [path.parts[:-1] for path in paths.values()]
    shared = 0
    while all(len(parts) > shared for parts in folders) and len({parts[shared] for parts in folders}) == 1:
        shared += 1
    return {file: PurePosixPath(*path.parts[shared:]) for file, path in paths.items()}


def outputs_of(
    classes: Sequence[str],
    used: Collection[str],
    num_classes: int,
    class_names: Sequence[str] | None,
    source: str,
) -> tuple[list[int | None], tuple[str, ...]]:
    """The model's output for each class, and the names of all outputs.

    In this order: by name, if the model's class names hold all used ones; as ImageNet-1k indices, if all used ones are
    WordNet ids of it and the model has 1,000 outputs; as they are, if the numbers agree.

    Args:
        classes: names that the labels index.
        used: those of them that occur.
        num_classes: number of the model's outputs.
        class_names: names of the outputs, if known.
        source: where the pictures come from, for messages.

    Raises:
        DataError: if none of these holds, or a used name stands for several outputs.
    """
    names = tuple(class_names or ())
    if names and set(used) <= set(names):
        twice = sorted(name for name in used if names.count(name) > 1)
        if twice:
            raise DataError(f"Class {twice[0]!r} of {source} is the name of several of the model's outputs.")
        return _index(classes, names), names
    if num_classes == 1000 and set(used) <= set(imagenet_wnids()):
        return _index(classes, imagenet_wnids()), imagenet_wnids()
    if len(classes) == num_classes:
        return list(range(num_classes)), tuple(classes)
    unknown = next((name for name in sorted(used) if names and name not in names), None)
    why = f" and knows no class {unknown!r}" if unknown is not None else ""
    raise DataError(
        f"{source} has {len(classes)} classes but the model has {num_classes} outputs{why}; "
        "name the class folders as the model names its classes, or give pictures of all of them."
    )


def _index(classes: Sequence[str], outputs: Sequence[str]) -> list[int | None]:
    at = {name: i for i, name in enumerate(outputs)}
    return [at.get(name) for name in classes]
