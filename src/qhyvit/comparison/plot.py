"""Accuracy and agreement against bits, one panel for each net, twin and scope."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from qhyvit.comparison.table import Comparison, Row

WIDTH, HEIGHT, DPI = 4.2, 3.2, 150


def draw(comparison: Comparison) -> bytes:
    """A PNG: widths from few to many along x; mean and standard deviation over seeds; the float net dashed.

    Top-1 is drawn where there are labels, agreement with the float net below it.
    """
    from matplotlib.figure import Figure  # no pyplot: no window, no state shared with the caller's plots

    rows = comparison.rows
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.axes["model"], row.axes["stress"], row.axes["scope"]), []).append(row)
    numbers = ["top1", "agreement"] if any(row.float_top1 is not None for row in rows) else ["agreement"]
    figure = Figure(figsize=(WIDTH * len(panels), HEIGHT * len(numbers)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(numbers), len(panels), squeeze=False)
    widths = sorted({row.axes["bits"] for row in rows}, key=_width)
    for column, (panel, members) in enumerate(panels.items()):
        for line, number in enumerate(numbers):
            _panel(axes[line][column], members, number, widths)
        axes[0][column].set_title(_plain(", ".join(part for part in panel if part != "none")), fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panel(axes: Axes, rows: list[Row], number: str, widths: list[str]) -> None:
    for method in dict.fromkeys(row.axes["method"] for row in rows):
        points = [
            (widths.index(row.axes["bits"]), 100 * mean, 100 * (row.std[number] or 0))
            for row in rows
            if row.axes["method"] == method and (mean := row.mean[number]) is not None
        ]
        if points:
            x, y, error = zip(*sorted(points), strict=True)
            axes.errorbar(x, y, yerr=error, marker="o", markersize=3, capsize=2, label=_plain(method))
    reference = next((row.float_top1 for row in rows if row.float_top1 is not None), None)
    if number == "top1" and reference is not None:
        axes.axhline(100 * reference, color="grey", linestyle="--", linewidth=1, label="float")
    axes.set_xticks(range(len(widths)), widths)
    axes.set_xlim(-0.3, len(widths) - 0.7)
    axes.set_ylabel("top-1 %" if number == "top1" else "agreement with float %")
    axes.grid(alpha=0.3)


def _width(bits: str) -> list[int]:
    numbers = [int(n) for n in re.findall(r"\d+", bits)]
    return [sum(numbers), *numbers]


def _plain(text: str) -> str:
    """Text without the signs that matplotlib reads as mathematics."""
    return text.replace("$", r"\$")
