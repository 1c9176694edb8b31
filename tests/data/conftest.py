"""Small pictures on disk."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qhyvit.data import Preprocessing

PLAIN = Preprocessing((3, 32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic", 1.0, "center")


@pytest.fixture
def plain() -> Preprocessing:
    """32×32, nothing cropped away from a square picture, pixels in 0..1."""
    return PLAIN


@pytest.fixture
def noise() -> Callable[..., Image.Image]:
    """A smooth random RGB picture."""

    def make(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
        values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def tree(tmp_path: Path, noise: Callable[..., Image.Image]) -> Path:
    """Three class folders with 4, 3 and 5 pictures, and files that are to be ignored."""
    root = tmp_path / "tree"
    for c, (name, count) in enumerate({"ant": 4, "bee": 3, "cat": 5}.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise(10 * c + i).save(root / name / f"{i}.{'png' if i % 2 else 'JPG'}", "PNG" if i % 2 else "JPEG")
    (root / "notes.txt").write_text("not a picture")
    (root / ".hidden.png").write_bytes(b"x")
    (root / "__MACOSX" / "ant").mkdir(parents=True)
    (root / "__MACOSX" / "ant" / "._0.jpg").write_bytes(b"x")
    return root


@pytest.fixture
def zipped() -> Callable[[Path], Path]:
    """Pack a folder as it is into a zip beside it."""

    def pack(folder: Path, prefix: str = "") -> Path:
        path = folder.with_suffix(".zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.rglob("*"), reverse=True):
                archive.write(file, prefix + file.relative_to(folder).as_posix())
        return path

    return pack
