"""The table of a comparison: cells gathered into rows over seeds; Markdown, CSV, JSON and a terminal's table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table
from rich.text import Text

from qhyvit.comparison.grid import Cell
from qhyvit.errors import QhyvitError
from qhyvit.evaluation import rounded

AXES = ("model", "stress", "scope", "bits", "method")
NUMBERS = ("top1", "agreement", "sqnr_db", "seconds")


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        float_top1: of the float net on the same pictures; None without labels.
        top1, agreement, sqnr_db: as in `evaluation.Scores`, of the simulation; None where the cell failed.
        seconds: that the quantization took, without capture, reading of pictures and scoring.
        pictures: scored.
        notes: the method's, for instance what it fell back to.
        error: the sentence of the `QhyvitError` that it failed with.
        skipped: why it was not run, though nothing is wrong with it.
    """

    float_top1: float | None = None
    top1: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    seconds: float | None = None
    pictures: int = 0
    notes: tuple[str, ...] = ()
    error: str | None = None
    skipped: str | None = None

    @property
    def scored(self) -> bool:
        """Whether it was run and went well."""
        return self.error is None and self.skipped is None


@dataclass(frozen=True)
class Row:
    """Cells that differ in the seed alone.

    Attributes:
        axes: model, stress, scope, bits, method.
        seeds: how many cells went well.
        float_top1: of the float net.
        mean: of each of `NUMBERS` over the cells that went well; None where there is none.
        std: sample standard deviation likewise (n - 1 in the denominator); None for fewer than two values.
        notes: of the first cell that went well, then why others were not run or failed, each once.
    """

    axes: Mapping[str, str]
    seeds: int
    float_top1: float | None
    mean: Mapping[str, float | None]
    std: Mapping[str, float | None]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Flat and JSON-able: top1_mean, top1_std, …"""
        numbers = {f"{n}_{k}": v[n] for n in NUMBERS for k, v in (("mean", self.mean), ("std", self.std))}
        fields = {**self.axes, "seeds": self.seeds, "float_top1": self.float_top1, **numbers}
        return {**rounded(fields), "notes": list(self.notes)}


def _row(axes: tuple[str, ...], outcomes: list[Outcome]) -> Row:
    good = [o for o in outcomes if o.scored]
    values = {name: [v for o in good if (v := getattr(o, name)) is not None] for name in NUMBERS}
    notes = [*(good[0].notes if good else ()), *(f"not run: {o.skipped}" for o in outcomes if o.skipped is not None)]
    notes += [f"failed: {o.error}" for o in outcomes if o.error is not None]
    return Row(
        dict(zip(AXES, axes, strict=True)),
        len(good),
        next((o.float_top1 for o in good), None),
        {name: fmean(v) if v else None for name, v in values.items()},
        {name: stdev(v) if len(v) > 1 else None for name, v in values.items()},
        tuple(dict.fromkeys(notes)),
    )


@dataclass(frozen=True)
class Comparison:
    """All cells with what became of them.

    Attributes:
        outcomes: in the order of the table.
        facts: what all cells share, for people: pictures, target.
        reused: how many cells came from an earlier run.
    """

    outcomes: Mapping[Cell, Outcome]
    facts: Mapping[str, str]
    reused: int = 0

    @property
    def rows(self) -> list[Row]:
        """Cells gathered over seeds."""
        groups: dict[tuple[str, ...], list[Outcome]] = {}
        for cell, outcome in self.outcomes.items():
            groups.setdefault(cell.row, []).append(outcome)
        return [_row(axes, outcomes) for axes, outcomes in groups.items()]

    @property
    def failed(self) -> dict[Cell, str]:
        """Cells that failed, with the sentence."""
        return {cell: o.error for cell, o in self.outcomes.items() if o.error is not None}

    def to_dict(self) -> dict[str, Any]:
        """Rows and cells, JSON-able; scores are fractions."""
        return {
            "facts": dict(self.facts),
            "rows": [row.to_dict() for row in self.rows],
            "cells": [
                {**dict(zip(AXES, cell.row, strict=True)), "seed": cell.seed, **rounded(asdict(outcome))}
                for cell, outcome in self.outcomes.items()
            ],
        }

    def to_csv(self) -> str:
        """Rows under a line of names, scores as fractions; notes joined by spaces."""
        out = io.StringIO()
        rows = [{**r, "notes": " ".join(r["notes"])} for r in (row.to_dict() for row in self.rows)]
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def to_markdown(self) -> str:
        """A table of mean ± standard deviation, with what all rows share above and the notes below."""
        heads, lines, shared, notes = self._text()
        marks = ["---" if head in AXES or head == "notes" else "---:" for head in heads]
        table = [heads, marks, *([_cell(c) for c in line] for line in lines)]
        parts = [". ".join(shared) + ".", "\n".join(f"| {' | '.join(line)} |" for line in table)]
        if notes:
            parts.append("\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1)))
        return "\n\n".join(parts) + "\n"

    def to_table(self) -> tuple[Table, str]:
        """The same for a terminal, and its notes."""
        heads, lines, shared, notes = self._text()
        table = Table(title=Text(". ".join(shared)), title_justify="left")
        for head in heads:
            table.add_column(head, justify="left" if head in AXES else "right")
        for line in lines:
            table.add_row(*map(Text, line))
        return table, "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1))

    def save(self, folder: str | Path) -> list[Path]:
        """Write comparison.md, .csv, .json and .png into a folder, each whole or not at all.

        Raises:
            QhyvitError: if they cannot be written.
        """
        from qhyvit.comparison.plot import draw

        place = Path(folder).expanduser()
        contents = {
            "comparison.md": self.to_markdown().encode(),
            "comparison.csv": self.to_csv().encode(),
            "comparison.json": (json.dumps(self.to_dict(), indent=1) + "\n").encode(),
            "comparison.png": draw(self),
        }
        return [write(place / name, content) for name, content in contents.items()]

    def _text(self) -> tuple[list[str], list[list[str]], list[str], list[str]]:
        """Heads, lines, what all rows share, and notes, which lines name by their numbers."""
        rows = self.rows
        notes = list(dict.fromkeys(note for row in rows for note in row.notes))
        varying = [a for a in AXES if a == "method" or len({row.axes[a] for row in rows}) > 1]
        shared = [f"{key}: {value}" for key, value in self.facts.items()]
        shared += [f"{a}: {rows[0].axes[a]}" for a in AXES if a not in varying]
        labelled = any(row.float_top1 is not None for row in rows)
        shown = [n for n in NUMBERS if labelled or n != "top1"]
        heads = [*varying, "seeds", *(["float %"] if labelled else []), *(HEADS[n] for n in shown)]
        lines = []
        for row in rows:
            line = [*(row.axes[a] for a in varying), str(row.seeds)]
            line += [_number("top1", row.float_top1, None)] if labelled else []
            line += [_number(n, row.mean[n], row.std[n]) for n in shown]
            line += [", ".join(str(notes.index(note) + 1) for note in row.notes)] if notes else []
            lines.append(line)
        return [*heads, *(["notes"] if notes else [])], lines, shared, notes


HEADS = {"top1": "top-1 %", "agreement": "agree %", "sqnr_db": "SQNR dB", "seconds": "seconds"}
_SHOW: dict[str, Callable[[float], str]] = {
    "top1": lambda v: f"{100 * v:.2f}",
    "agreement": lambda v: f"{100 * v:.2f}",
    "sqnr_db": lambda v: f"{v:.2f}",
    "seconds": lambda v: f"{v:.1f}",
}


def _number(name: str, mean: float | None, std: float | None) -> str:
    if mean is None or not math.isfinite(mean):
        return "-"
    return _SHOW[name](mean) + ("" if std is None else f" ± {_SHOW[name](std)}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write(path: Path, content: bytes) -> Path:
    """Write a file, whole or not at all, and the folder for it.

    Raises:
        QhyvitError: if it cannot be written.
    """
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise QhyvitError(f"{path} cannot be written: {error.strerror or error}; name another folder.") from None
    return path
