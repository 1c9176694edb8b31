"""What the command line shows: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qhyvit.errors import QhyvitError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qhyvit.data.dataset import Dataset
    from qhyvit.models.load import LoadedModel
    from qhyvit.quantized import QuantizedModel


class Say:
    """Remarks go to standard error, results to standard output.

    Args:
        quiet: leave out the remarks that are not warnings.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._err, self._out = Console(stderr=True, highlight=False), Console(highlight=False)

    def remark(self, text: str) -> None:
        """A line on the way."""
        if not self._quiet:
            self._err.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line nobody should miss."""
        self._err.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def model(self, loaded: LoadedModel) -> None:
        """Which weights, which preprocessing."""
        from qhyvit.data.preprocessing import Preprocessing

        preprocessing = Preprocessing.from_config(loaded.preprocessing_config)
        self.remark(f"{loaded.name}: {loaded.source}; {loaded.num_classes} classes; {preprocessing}")
        if not loaded.trained:
            self.warn(f"{loaded.name} has {loaded.source}: accuracies mean nothing; pass --weights or --pretrained.")

    def show(self, result: Table | str) -> None:
        """A table or text of the result."""
        width = None if self._out.is_terminal else 160  # in a file there is no edge to wrap at
        self._out.print(result, markup=False, width=width)

    def skipped(self, dataset: Dataset | None) -> None:
        """Pictures that could not be read."""
        if dataset is not None and dataset.skipped:
            name, reason = next(iter(dataset.skipped.items()))
            self.warn(f"{len(dataset.skipped)} pictures of {dataset.name} were skipped; the first, {name}: {reason}")

    def result(self, result: dict[str, Any], as_json: bool) -> None:
        """The result of a command."""
        if as_json:
            print(json.dumps(result))
        elif "float" in result and isinstance(result["float"], dict):
            self._out.print(scores_table(result))
            for key in ("verification", "folder"):
                if key in result:
                    self._out.print(_line(key, result[key]), markup=False, soft_wrap=True)
        else:
            self._out.print(_line("", result), markup=False, soft_wrap=True)


def scores_table(result: dict[str, Any]) -> Table:
    """Float, simulated and deployed side by side; columns nobody has a value for are left out."""
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "top1": ("top-1", lambda v: f"{100 * v:.2f} %"),
        "top5": ("top-5", lambda v: f"{100 * v:.2f} %"),
        "agreement": ("agreement with float", lambda v: f"{100 * v:.2f} %"),
        "sqnr_db": ("SQNR to float", lambda v: f"{v:.1f} dB"),
        "bytes": ("size", lambda v: f"{v / 1e6:.2f} MB"),
        "latency_ms": ("latency", lambda v: f"{v:.2f} ms"),
    }
    rows = {name: result[name] for name in ("float", "simulated", "deployed") if result.get(name)}
    shown = [c for c in columns if any(row.get(c) is not None for row in rows.values())]
    pictures = next(iter(rows.values())).get("pictures")
    table = Table(title=f"{pictures} pictures" if pictures else None, title_justify="left")
    table.add_column("")
    for column in shown:
        table.add_column(columns[column][0], justify="right")
    for name, row in rows.items():
        table.add_row(name, *(columns[c][1](row[c]) if row.get(c) is not None else "" for c in shown))
    return table


def _line(key: str, value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
    return f"{key}: {value}" if key else str(value)


def show_list(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A list of named things."""
    if as_json:
        print(json.dumps(rows))
        return
    table = Table()
    for key in rows[0]:
        table.add_column(key.replace("_", " "))
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(highlight=False).print(table)


def show_models(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Nets by name, with what they cost and what was published about them."""
    if as_json:
        print(json.dumps(rows))
        return
    table = Table()
    table.add_column("name", no_wrap=True)
    for title in ("par. M", "MMACs", "input", "float", "W8A8", "W6A6"):
        table.add_column(title, justify="right")
    for row in rows:
        size = "×".join(map(str, dict.fromkeys(row["input_size"][1:])))
        scores = [_published(row.get("published", {}).get(kind)) for kind in ("float", "w8a8", "w6a6")]
        table.add_row(row["name"], f"{row['parameters']:.2f}", f"{row['macs']:.0f}", size, *scores)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "Top-1 in % on ImageNet-1k as reported, not measured here; W8A8 and W6A6 by Q-HyViT, softmax and norms float.\n"
        "† copied by a third party from the authors' table. The sources: qhyvit models --json"
    )


def _published(score: dict[str, Any] | None) -> str:
    return f"{100 * score['top1']:.2f}{'†' if score['second_hand'] else ' '}" if score else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, tuple | list):
        return "×".join(map(str, value))
    return "" if value is None else str(value)


def is_result(name: str) -> bool:
    """Whether an argument names a folder that `qhyvit quantize` wrote."""
    return (Path(name) / "info.json").is_file()


def pictures(data: str | None) -> Dataset | None:
    """The evaluation pictures asked for; None: the built-in ones that fit the model."""
    from qhyvit.data.dataset import open_dataset

    return None if data is None else open_dataset(data, "evaluation")


def finish(
    quantized: QuantizedModel, out: Path, data: str | None, limit: int | None, force: bool, say: Say
) -> dict[str, Any]:
    """Save, then evaluate, verify and time what was saved; everything in one dictionary, also in metrics.json."""
    from qhyvit.evaluation import evaluate
    from qhyvit.latency import bench
    from qhyvit.store import exported_path, save, write_metrics
    from qhyvit.verification import verify

    save(quantized, out, overwrite=force)
    say.remark(f"saved {out}; evaluating")
    for note in quantized.parameters.notes:
        say.remark(note)
    dataset = pictures(data)
    scores = evaluate(quantized, dataset, folder=out, limit=limit)
    say.skipped(dataset)
    result: dict[str, Any] = {name: s.to_dict() if s else None for name, s in scores.items()}
    result["float"]["bytes"] = (out / "float.safetensors").stat().st_size
    exported = exported_path(out)
    if exported is not None:
        result["verification"] = verify(quantized, dataset, folder=out, limit=min(limit or 128, 128)).to_dict()
        latency = bench(quantized, folder=out, runs=20)
        result["latency"] = latency.to_dict()
        result["float"]["latency_ms"] = latency.float_ms
        result["deployed"].update(bytes=exported.stat().st_size, latency_ms=latency.integer_ms)
    result["folder"] = str(out)
    write_metrics(out, result)
    return result


def show_overflow(folder: str, as_json: bool) -> None:
    """Zero points that overflowed in a result, layer by layer, before channels were shifted.

    Raises:
        QhyvitError: if `folder` is no result, or its method did not count them.
    """
    from qhyvit.store import load

    if not is_result(folder):
        raise QhyvitError(f"{folder} is no result of qhyvit quantize; overflow is counted while a method calibrates.")
    found = load(folder).info.get("report", {}).get("overflow")
    if found is None:
        raise QhyvitError(
            f"The method of {folder} does not count overflowing zero points; quantize with method qhyvit."
        )
    if as_json:
        typer.echo(json.dumps({"overflow": found}))
        return
    for row in found:
        whole = ", the whole tensor too" if row["tensor"] else ""
        typer.echo(f"{row['module'] or row['value']}: {row['overflowing']} of {row['channels']} channels{whole}")
    if not found:
        typer.echo("no zero point overflows")


def show_losses(folder: str, data: str | None, limit: int, as_json: bool) -> None:
    """What each operator of a result loses, alone and in the net.

    Raises:
        QhyvitError: if `folder` is no result.
    """
    from qhyvit.diagnosis import losses
    from qhyvit.store import load

    if not is_result(folder):
        raise QhyvitError(f"{folder} is no result of qhyvit quantize; losses are those of a quantized model.")
    found = losses(load(folder), data, limit=limit)
    if as_json:
        print(json.dumps({"losses": [loss.to_dict() for loss in found]}))
        return
    table = Table(
        caption="SQNR in dB. Share: of the squared errors in the logits that all operators cause, each alone."
    )
    table.add_column("operator", overflow="fold")
    for title in ("share", "logits, alone", "output, alone", "output, in net"):
        table.add_column(title, justify="right")
    for loss in found:
        numbers = (f"{v:.1f}" for v in (loss.logits_db, loss.alone_db, loss.in_net_db))
        table.add_row(escape(loss.module or loss.node), f"{loss.share:.1%}", *numbers)
    Console(highlight=False).print(table)
