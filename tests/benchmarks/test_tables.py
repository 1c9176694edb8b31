"""Tables of docs: lines and columns of comparisons, later files before earlier ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from tables import gathered, table


def row(method: str, bits: str, top1: float, sqnr: float, std: float | None = None, seeds: int = 1) -> dict[str, Any]:
    axes = {"model": "net", "stress": "none", "scope": "partial", "bits": bits, "method": method}
    numbers = {"top1_mean": top1, "sqnr_db_mean": sqnr, "sqnr_db_std": std}
    return {**axes, "seeds": seeds, **(numbers if seeds else dict.fromkeys(numbers))}


def test_methods_run_across_and_the_later_file_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps({"rows": [row("mse", "w8a8", 0.1, 1.0), row("qhyvit", "w8a8", 0.5, 26.04, 0.25, 3)]}))
    second.write_text(json.dumps({"rows": [row("mse", "w8a8", 0.25, 20.0), row("qhyvit", "w4a4", 0, 0, seeds=0)]}))
    assert table(gathered([first, second]), ["bits"], "method", ["top1", "sqnr_db"]).splitlines() == [
        "| bits | `mse` | `qhyvit` |",
        "| --- | --- | --- |",
        "| `w8a8` | 25.0 / 20.0 | 50.0 / 26.0 ± 0.2 |",
        "| `w4a4` | – | – |",
    ]
