"""The tables of docs/: rows of comparisons turned so that one axis runs across, as Markdown.

    python benchmarks/tables.py comparison/comparison.json --down model,bits --across method
    python benchmarks/tables.py comparison/comparison.json --where bits=w8a8 --down method --across model --show sqnr_db

Reads what `qhyvit compare` wrote; where files hold the same row, the later file's counts. A cell shows means over the
draws, percent for top-1 and agreement, and with several draws the standard deviation of the last number.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

AXES = ("model", "stress", "scope", "bits", "method")
PLACES = {"top1": "{:.1f}", "agreement": "{:.1f}", "sqnr_db": "{:.1f}", "seconds": "{:.0f}"}
PERCENT = ("top1", "agreement")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="comparison.json of one or more comparisons")
    parser.add_argument("--down", default="model,bits", help=f"axes that name a line, of {', '.join(AXES)}")
    parser.add_argument("--across", default="method", help="the axis whose values are columns")
    parser.add_argument("--show", default="top1,agreement,sqnr_db", help="numbers of a cell")
    parser.add_argument("--where", default="", help="axis=value,…: only these rows")
    args = parser.parse_args()
    wanted = dict(pair.split("=", 1) for pair in args.where.split(",") if pair)
    for axis in (*args.down.split(","), args.across, *wanted):
        if axis not in AXES:
            parser.error(f"{axis} is none of {', '.join(AXES)}")
    rows = [r for r in gathered(args.files) if all(r[a] == v for a, v in wanted.items())]
    print(table(rows, args.down.split(","), args.across, args.show.split(",")))


def gathered(files: list[Path]) -> list[dict[str, Any]]:
    """The rows of all files, each once."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in files:
        for row in json.loads(path.read_text())["rows"]:
            found[tuple(row[a] for a in AXES)] = row
    return list(found.values())


def table(rows: list[dict[str, Any]], down: list[str], across: str, show: list[str]) -> str:
    """A Markdown table; lines and columns in the order in which the rows name them."""
    columns = list(dict.fromkeys(r[across] for r in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(row[a] for a in down), {})[row[across]] = cell(row, show)
    head = [*down, *(f"`{c}`" for c in columns)]
    body = [[*(f"`{v}`" for v in names), *(found.get(c, "–") for c in columns)] for names, found in lines.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def cell(row: dict[str, Any], show: list[str]) -> str:
    """One row's numbers."""
    if row["seeds"] == 0:
        return "–"
    parts = [PLACES[n].format(row[f"{n}_mean"] * (100 if n in PERCENT else 1)) for n in show]
    spread = row[f"{show[-1]}_std"]
    if spread is not None:
        parts[-1] += f" ± {PLACES[show[-1]].format(spread * (100 if show[-1] in PERCENT else 1))}"
    return " / ".join(parts)


if __name__ == "__main__":
    main()
