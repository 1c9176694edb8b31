"""Rows from cells: means and deviations worked out by hand, and what is shown of them."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from qhyvit.comparison.grid import Cell
from qhyvit.comparison.table import Comparison, Outcome
from qhyvit.recipe import Recipe


def cell(method: str, seed: int, bits: str = "w8a8", stress: str = "none") -> Cell:
    return Cell("net", stress, "partial", bits, method, seed, Recipe())


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        {
            cell("mse", 0): Outcome(0.9, 0.6, 0.8, 20.0, 1.0, 50, ("a | b",)),
            cell("mse", 1): Outcome(0.9, 0.7, 0.8, 23.0, 3.0, 50, ("not shown: another seed's",)),
            cell("kl", 0): Outcome(0.9, 0.5, 0.6, 10.0, 2.0, 50, ("a | b",)),
            cell("kl", 1): Outcome(error="No such layer."),
            cell("odd", 0): Outcome(error="Never [red]well[/red]."),
        },
        {"evaluation": "50 of val.zip"},
    )


def test_mean_and_sample_standard_deviation(comparison: Comparison) -> None:
    mse, kl, odd = comparison.rows
    assert mse.seeds == 2
    assert mse.mean == pytest.approx({"top1": 0.65, "agreement": 0.8, "sqnr_db": 21.5, "seconds": 2.0})
    expected = {"top1": 0.1 / math.sqrt(2), "agreement": 0.0, "sqnr_db": 3 / math.sqrt(2), "seconds": math.sqrt(2)}
    assert mse.std == pytest.approx(expected)
    assert (kl.seeds, kl.mean["top1"], kl.std["top1"]) == (1, 0.5, None)
    assert (odd.seeds, odd.mean["top1"], odd.float_top1) == (0, None, None)
    assert kl.notes == ("a | b", "failed: No such layer.")
    assert list(comparison.failed.values()) == ["No such layer.", "Never [red]well[/red]."]


def test_markdown(comparison: Comparison) -> None:
    above, table, notes = comparison.to_markdown().rstrip("\n").split("\n\n")
    assert above == "evaluation: 50 of val.zip. model: net. stress: none. scope: partial. bits: w8a8."
    lines = table.splitlines()
    assert lines[0] == "| method | seeds | float % | top-1 % | agree % | SQNR dB | seconds | notes |"
    assert lines[2] == "| mse | 2 | 90.00 | 65.00 ± 7.07 | 80.00 ± 0.00 | 21.50 ± 2.12 | 2.0 ± 1.4 | 1 |"
    assert lines[3] == "| kl | 1 | 90.00 | 50.00 | 60.00 | 10.00 | 2.0 | 1, 2 |"
    assert lines[4] == "| odd | 0 | - | - | - | - | - | 3 |"
    assert notes == "1. a | b\n2. failed: No such layer.\n3. failed: Never [red]well[/red]."


def test_what_differs_is_a_column_and_missing_labels_are_none() -> None:
    found = Comparison(
        {
            cell("a|b", 0, stress="none"): Outcome(None, None, 0.5, 1.0, 1.0, 5),
            cell("a|b", 0, stress="ranges:30"): Outcome(None, None, 0.5, 1.0, 1.0, 5),
        },
        {},
    )
    lines = found.to_markdown().split("\n\n")[1].splitlines()
    assert lines[0] == "| stress | method | seeds | agree % | SQNR dB | seconds |"
    assert lines[2] == r"| none | a\|b | 1 | 50.00 | 1.00 | 1.0 |"


def test_csv_and_json_hold_fractions(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert [row["method"] for row in rows] == ["mse", "kl", "odd"]
    assert float(rows[0]["top1_mean"]) == 0.65
    assert float(rows[0]["top1_std"]) == 0.070711
    assert rows[1]["top1_std"] == rows[2]["top1_mean"] == ""
    data = json.loads(json.dumps(comparison.to_dict()))
    assert [c["seed"] for c in data["cells"]] == [0, 1, 0, 1, 0]
    assert data["cells"][3]["error"] == "No such layer."
    assert data["rows"][0]["notes"] == ["a | b"]


def test_saved_files_are_whole_and_overwritten(comparison: Comparison, tmp_path: Path) -> None:
    for _ in range(2):
        paths = comparison.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in paths)
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8") == comparison.to_markdown()
