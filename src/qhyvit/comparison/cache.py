"""Finished cells on disk, by a checksum of all that decides them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qhyvit import __version__
from qhyvit._tensors import pack
from qhyvit.comparison.grid import Cell
from qhyvit.comparison.peers import PEERS
from qhyvit.comparison.table import Outcome, write
from qhyvit.data.dataset import Dataset
from qhyvit.graph.serialise import to_json
from qhyvit.models.load import LoadedModel

FORMAT = 1
_DECIDE_NOTHING = {
    "cli.py",
    "cli_compare.py",
    "terminal.py",
    "progress.py",
    "plot.py",
}  # of the package; they decide no number


class Store:
    """A folder with a file for each finished cell.

    A file says in plain text what it is the result of, and is whole or not there. Cells that failed are not kept: they
    are tried again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Outcome | None:
        """What `put` was given, or None; a damaged file counts as none."""
        try:
            found = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))["outcome"]
            return Outcome(**{**found, "notes": tuple(found["notes"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, decides: dict[str, Any], outcome: Outcome) -> None:
        """Keep an outcome.

        Raises:
            QhyvitError: if the file cannot be written.
        """
        content = json.dumps({"outcome": asdict(outcome), "decides": decides}, indent=1) + "\n"
        write(self.folder / f"{key}.json", content.encode())


def decisive(
    cell: Cell, model: dict[str, Any], calibration: dict[str, Any], evaluation: dict[str, Any]
) -> dict[str, Any]:
    """All that decides a cell, JSON-able: net, twin, recipe, peer, pictures, versions."""
    return {
        "format": FORMAT,
        "qhyvit": __version__,
        "source": _source_checksum(),
        "torch": torch.__version__,
        "model": model,
        "stress": cell.stress,
        "recipe": cell.recipe.to_yaml(),
        "peer": None if cell.peer is None else [cell.peer, PEERS[cell.peer].versions()],
        "calibration": calibration,
        "evaluation": evaluation,
    }


def checksum(decides: dict[str, Any]) -> str:
    """Name of the file for what is decided so."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def model_facts(loaded: LoadedModel) -> dict[str, Any]:
    """What identifies a captured net: its operators and weights as one checksum, its preprocessing and classes."""
    packed, strides = pack(dict(loaded.module.named_buffers(recurse=False)))
    graph = json.dumps(to_json(loaded.module), sort_keys=True)  # type: ignore[arg-type]
    digest = hashlib.sha256(packed)
    digest.update(json.dumps([strides, graph, loaded.class_names], sort_keys=True).encode())
    return {
        "name": loaded.name,
        "checksum": digest.hexdigest(),
        "preprocessing": json.loads(json.dumps(loaded.preprocessing_config, default=str)),
    }


def data_facts(data: Dataset, given: object, limit: int | None) -> dict[str, Any]:
    """What identifies pictures without reading them: where they lie, how many, and a file's size."""
    path = Path(given).expanduser() if isinstance(given, str | Path) else None
    known = path is not None and path.exists()
    return {
        "name": str(path.resolve()) if path is not None and known else data.name,
        "pictures": len(data),
        "bytes": path.stat().st_size if path is not None and path.is_file() else None,
        "limit": limit,
    }


@cache
def _source_checksum() -> str:
    """Of the package's own code: between releases the version stays while methods change."""
    home = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        if path.name not in _DECIDE_NOTHING:
            digest.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
