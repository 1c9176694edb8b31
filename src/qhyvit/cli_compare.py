"""The command `qhyvit compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qhyvit import terminal
from qhyvit.errors import QhyvitError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qhyvit.comparison import Cell, Comparison, Outcome

EXAMPLES = (
    "Examples:\n\n`qhyvit compare --limit 200`: the demo net, four methods, three widths, three seeds\n\n"
    "`qhyvit compare mobilevit_xxs --weights net.safetensors --calib train.zip --data val.zip --methods all --jobs 4`"
    "\n\n`qhyvit compare --methods mse,qhyvit:variant=paper --stress none,ranges:30 --bits w8a8`: on a harder twin too"
    "\n\n`qhyvit compare --peers --bits w8a8`: beside ONNX Runtime's and NNCF's own quantizers"
    "\n\n`qhyvit compare --ablation --bits w4a4`: what each step of Q-HyViT brings"
)


def compare(
    models: Annotated[
        list[str] | None, typer.Argument(help="demo, zoo/NAME, timm names, pkg.module:builder [demo].", metavar="MODEL")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names, options after colons, or all [minmax,percentile,mse,qhyvit].")
    ] = None,
    bits: Annotated[str, typer.Option(help="Widths.")] = "w8a8,w6a6,w4a4",
    scopes: Annotated[str, typer.Option(help="partial, full or both.")] = "partial",
    seeds: Annotated[int, typer.Option(help="Draws of calibration pictures.", min=1)] = 3,
    stress: Annotated[str, typer.Option(help="Twins to take: none,ranges:30,shift,both:30.")] = "none",
    ablation: Annotated[bool, typer.Option("--ablation", help="The steps of Q-HyViT, on target simulate.")] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="ONNX Runtime's and NNCF's quantizers too; needs qhyvit[peers].")
    ] = False,
    calib: Annotated[str | None, typer.Option(help="Calibration pictures; labels are not needed.")] = None,
    calib_size: Annotated[int | None, typer.Option(help="Calibration pictures of each draw [128].", min=1)] = None,
    data: Annotated[str | None, typer.Option(help="Evaluation pictures: folder, zip, npz, flowers or photos.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score at most so many pictures.", min=1)] = None,
    target: Annotated[str | None, typer.Option(help="See `qhyvit targets` [onnxruntime].")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe for all else.")] = None,
    weights: Annotated[
        list[Path] | None, typer.Option(help="State dict; as many as there are MODELs, in their order.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take the published weights (downloads).")] = False,
    input_size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.", min=8)] = None,
    jobs: Annotated[int, typer.Option(help="Processes; -1: all cores.")] = 1,
    threads: Annotated[int, typer.Option(help="Torch threads of each process.", min=1)] = 1,
    backend: Annotated[str, typer.Option(help="joblib's: loky, multiprocessing, dask, ray.")] = "loky",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for table, plot and cells.")] = Path("comparison"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Models × methods × widths × scopes × seeds: one table and a plot. Stopped, the same command goes on."""
    from qhyvit.comparison import compare as run

    say = terminal.Say(quiet=as_json)
    if out.is_file():
        raise QhyvitError(f"{out} is a file; name a folder for the comparison.")
    try:
        result = run(
            models or "demo",
            methods=None if methods is None else _split(methods),
            bits=_split(bits),
            scopes=_split(scopes),
            seeds=seeds,
            stress=_split(stress),
            ablate=ablation,
            peers=peers,
            calib=calib,
            data=data,
            limit=limit,
            recipe=recipe,
            weights=weights,
            pretrained=pretrained,
            input_size=input_size,
            cache=out / "cells",
            jobs=jobs,
            threads=threads,
            backend=backend,
            on_cell=_reporter(say),
            target=target,
            calibration=None if calib_size is None else {"size": calib_size},
        )
    except KeyboardInterrupt:
        say.remark(f"finished cells are kept in {out / 'cells'}; the same command goes on from there")
        raise
    result.save(out)
    show(result, out, say, as_json)


def show(result: Comparison, out: Path, say: terminal.Say, as_json: bool) -> None:
    """The table with its notes, or one JSON object."""
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    table, notes = result.to_table()
    say.show(table)
    if notes:
        say.show(notes)
    for cell, sentence in result.failed.items():
        say.warn(f"{cell} failed: {sentence}")
    say.remark(f"saved {out}; {result.reused} of {len(result.outcomes)} cells were there already")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _reporter(say: terminal.Say) -> Callable[[Cell, Outcome], None]:
    """A line for each cell where no bar is shown."""

    def report(cell: Cell, outcome: Outcome) -> None:
        if sys.stderr.isatty():
            return
        numbers = {"top-1": outcome.top1, "agreement": outcome.agreement, "SQNR": outcome.sqnr_db}
        scores = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
        say.remark(f"{cell}: {outcome.error or scores}")

    return report
