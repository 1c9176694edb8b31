"""The command line: parses, calls the API, shows what came out. Everything it does, the Python API does too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhyvit import cli_compare, terminal
from qhyvit.errors import QhyvitError

if TYPE_CHECKING:
    from torch.fx import GraphModule

app = typer.Typer(
    name="qhyvit",
    help="Quantize trained hybrid vision transformers into integer models that really run.\n\n"
    "Without a MODEL, commands work on a small trained net and photographs that ship with the package.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="demo, a timm name, torchvision/NAME, or pkg.module:builder.", show_default=True)
]
Folder = Annotated[Path, typer.Argument(help="A folder that `qhyvit quantize` wrote.")]
Weights = Annotated[Path | None, typer.Option(help="State dict: .safetensors, .pth, .pt or .bin.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Take the published weights (downloads).")]
InputSize = Annotated[int | None, typer.Option(help="Side of the pictures in pixels.", min=8)]
Stress = Annotated[
    str | None, typer.Option(help="Take a twin, equal in float but hard to quantize: ranges:30, shift, both:30.")
]
Data = Annotated[str | None, typer.Option(help="Evaluation pictures: folder, zip, npz, flowers or photos.")]
Limit = Annotated[int | None, typer.Option(help="Use at most so many pictures.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]


@app.command(
    epilog="Examples:\n\n"
    "`qhyvit quantize -o out/`: the demo net\n\n"
    "`qhyvit quantize mobilevit_s --pretrained --calib photos/ -o out/`: a timm net, your pictures\n\n"
    "`qhyvit quantize mobilevit_s --pretrained --method mse -o out/`: by ranges alone, in a fraction of the time\n\n"
    "`qhyvit quantize nets:build --weights net.safetensors --calib photos.zip --bits w6a6 -o out/`: your own\n\n"
    "`qhyvit quantize --recipe out/recipe.yaml -o again/`: the same once more"
)
def quantize(
    model: Model = "demo",
    calib: Annotated[str | None, typer.Option(help="Calibration pictures; labels are not needed.")] = None,
    calib_size: Annotated[int | None, typer.Option(help="Calibration pictures to use [128].", min=1)] = None,
    data: Data = None,
    bits: Annotated[str | None, typer.Option(help="Widths, like w8a8, w6a6, w4a8 [w8a8].")] = None,
    method: Annotated[str | None, typer.Option(help="See `qhyvit methods` [qhyvit].")] = None,
    scope: Annotated[str | None, typer.Option(help="partial, or full: norms, softmax, additions too.")] = None,
    target: Annotated[str | None, typer.Option(help="See `qhyvit targets` [onnxruntime].")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the calibration pictures [0].", min=0)] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe; options given beside it win.")] = None,
    keep_float: Annotated[list[str] | None, typer.Option(help="Leave modules of this pattern float.")] = None,
    percentile: Annotated[float | None, typer.Option(help="For --method percentile [99.99].")] = None,
    saturation: Annotated[
        str | None, typer.Option(help="For x86 without VNNI: auto, unsigned, reduce-range or ignore [auto].")
    ] = None,
    bias_correction: Annotated[bool, typer.Option("--bias-correction", help="Correct mean errors in biases.")] = False,
    weights: Weights = None,
    pretrained: Pretrained = False,
    input_size: InputSize = None,
    stress: Stress = None,
    limit: Limit = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("out"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing result.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model, export it, run it, and say what was lost."""
    from qhyvit.models.load import load_model
    from qhyvit.pipeline import quantize as run
    from qhyvit.recipe import Recipe
    from qhyvit.store import check_writable

    start = Recipe.from_yaml(recipe) if recipe else Recipe()
    changes: dict[str, Any] = {
        "bits": bits,
        "method": method,
        "scope": scope,
        "target": target,
        "seed": seed,
        "saturation": saturation,
        "bias_correction": True if bias_correction else None,
        "ranges": {"percentile": percentile} if percentile is not None else None,
        "calibration": {"size": calib_size} if calib_size is not None else None,
        "overrides": [*start.overrides, *({"match": m, "bits": "float"} for m in keep_float)] if keep_float else None,
    }
    start = start.updated(**changes)
    check_writable(out, overwrite=force)  # before minutes of work, not after
    loaded = load_model(
        model, weights=weights, pretrained=pretrained, input_size=input_size, seed=start.seed, stress=stress
    )
    say = terminal.Say(quiet=as_json)
    say.model(loaded)
    quantized = run(loaded, calib=calib, recipe=start)
    result = terminal.finish(quantized, out, data, limit, force, say)
    say.result(result, as_json)


@app.command(
    epilog="Examples:\n\n`qhyvit evaluate out/ --data val/`: float, simulated, deployed side by side\n\n"
    "`qhyvit evaluate mobilevit_s --pretrained --data val/`: the float model alone"
)
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that `qhyvit quantize` wrote, or a model.")] = "demo",
    data: Data = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    input_size: InputSize = None,
    stress: Stress = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Top-1 and top-5 of the float, the simulated and the deployed model on the same pictures."""
    from qhyvit.evaluation import evaluate as run
    from qhyvit.models.load import load_model
    from qhyvit.store import load

    say = terminal.Say(quiet=as_json)
    if terminal.is_result(model):
        folder: Path | None = Path(model)
        subject: Any = load(model)
    else:
        folder = None
        subject = load_model(model, weights=weights, pretrained=pretrained, input_size=input_size, stress=stress)
        say.model(subject)
    dataset = terminal.pictures(data)
    scores = run(subject, dataset, folder=folder, limit=limit)
    say.skipped(dataset)
    say.result({name: s.to_dict() if s else None for name, s in scores.items()}, as_json)


app.command(epilog=cli_compare.EXAMPLES)(cli_compare.compare)


@app.command(epilog="Example:\n\n`qhyvit export out/ -o model.onnx`")
def export(
    folder: Folder,
    target: Annotated[str | None, typer.Option(help="Another target than the recipe's.")] = None,
    float_model: Annotated[bool, typer.Option("--float", help="Write the float model, for comparison.")] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("model.onnx"),
    as_json: Json = False,
) -> None:
    """Write the deployable file of a quantized model."""
    from qhyvit.pipeline import export as run
    from qhyvit.store import load

    run(load(folder), out, target=target, quantized=not float_model)
    terminal.Say(quiet=as_json).result({"file": str(out), "bytes": out.stat().st_size}, as_json)


@app.command(epilog="Example:\n\n`qhyvit verify out/ --data val/`")
def verify(folder: Folder, data: Data = None, limit: Limit = 128, as_json: Json = False) -> None:
    """Run simulation and runtime on the same pictures; report SQNR, top-1 agreement and integer operators."""
    from qhyvit.store import load
    from qhyvit.verification import verify as run

    quantized = load(folder)
    dataset = terminal.pictures(data)
    found = run(quantized, dataset, folder=folder, limit=limit)
    say = terminal.Say(quiet=as_json)
    say.skipped(dataset)
    say.result(found.to_dict(), as_json)


@app.command(epilog="Example:\n\n`qhyvit bench out/ --runs 200`")
def bench(
    folder: Folder,
    runs: Annotated[int, typer.Option(help="Timed runs of each model.", min=1)] = 50,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.", min=1)] = 1,
    batch: Annotated[int, typer.Option(help="Pictures at a time.", min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Latency of the integer model against the float one, interleaved runs on this machine."""
    from qhyvit.latency import bench as run
    from qhyvit.store import load

    found = run(load(folder), folder=folder, runs=runs, threads=threads, batch=batch)
    terminal.Say(quiet=as_json).result(found.to_dict(), as_json)


@app.command(
    epilog="Examples:\n\n`qhyvit inspect --bridges mobilevit_s`: where convolutions hand over to attention\n\n"
    "`qhyvit inspect --overflow out/`: layers whose zero points overflowed before channels were shifted\n\n"
    "`qhyvit inspect --losses out/ --data val.zip`: which layers lose most, each by itself and in the net"
)
def inspect(
    model: Annotated[str, typer.Argument(help="A folder that `qhyvit quantize` wrote, or a model.")] = "demo",
    bridges: Annotated[bool, typer.Option("--bridges", help="Bridge blocks: last convolutions, projections.")] = False,
    overflow: Annotated[bool, typer.Option("--overflow", help="Overflowing zero points (a result's).")] = False,
    losses: Annotated[bool, typer.Option("--losses", help="What each operator loses (a result's).")] = False,
    data: Data = None,
    limit: Annotated[int, typer.Option(help="Measure losses on so many pictures.", min=1)] = 32,
    weights: Weights = None,
    pretrained: Pretrained = False,
    input_size: InputSize = None,
    stress: Stress = None,
    as_json: Json = False,
) -> None:
    """Look into a model."""
    from qhyvit.graph.bridges import find_bridges

    if bridges + overflow + losses != 1:
        raise QhyvitError("Pass one of --bridges, --overflow and --losses.")
    if losses:
        terminal.show_losses(model, data, limit, as_json)
        return
    if overflow:
        terminal.show_overflow(model, as_json)
        return
    graph = _graph(model, weights, pretrained, input_size, stress)
    found = find_bridges(graph)
    if as_json:
        typer.echo(json.dumps({"bridges": [{"members": b.members, "modules": b.modules} for b in found]}))
        return
    for number, block in enumerate(found, 1):
        typer.echo("\n  ".join([f"bridge block {number}", *block.modules]))
    if not found:
        typer.echo("no bridge blocks: no attention follows convolutions")


def _graph(
    model: str, weights: Path | None, pretrained: bool, input_size: int | None, stress: str | None
) -> GraphModule:
    """The float graph of a result or of a model, whose weights may be random."""
    import torch

    from qhyvit.data.preprocessing import Preprocessing
    from qhyvit.graph.capture import capture
    from qhyvit.models.load import load_model
    from qhyvit.store import load

    if terminal.is_result(model):
        return load(model).graph
    loaded = load_model(model, weights=weights, pretrained=pretrained, input_size=input_size, stress=stress)
    size = Preprocessing.from_config(loaded.preprocessing_config).input_size
    return capture(loaded.module, torch.zeros(1, *size))


@app.command(epilog="Example:\n\n`qhyvit models`, then `qhyvit quantize mobilevit_xs --pretrained -o out/`")
def models(as_json: Json = False) -> None:
    """Models by name, with size, cost and published top-1. Every other timm or torchvision classifier works too."""
    from qhyvit.models.load import list_models

    terminal.show_models(list_models(), as_json)


@app.command(epilog="Example:\n\n`qhyvit methods`, then `qhyvit quantize --method minmax -o out/`")
def methods(as_json: Json = False) -> None:
    """Quantization methods."""
    from qhyvit.methods import METHODS
    from qhyvit.targets import TARGETS

    rows = []
    for name, method in METHODS.items():
        lacking = {n: method.lacking(t) for n, t in TARGETS.items()}
        replaced = "; ".join(f"{n}: {', '.join(kinds)}" for n, kinds in lacking.items() if kinds)
        rows.append({"name": name, "description": method.description, "replaced": replaced})
    terminal.show_list(rows, as_json)


@app.command(epilog="Example:\n\n`qhyvit targets --json`")
def targets(as_json: Json = False) -> None:
    """Runtimes that models can be written for."""
    from qhyvit.targets import TARGETS

    terminal.show_list([{"name": n, "description": t.description} for n, t in TARGETS.items()], as_json)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        from qhyvit import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: a `QhyvitError` is one sentence and exit code 2, Ctrl-C is 130."""
    try:
        app()
    except QhyvitError as error:
        typer.echo(f"qhyvit: {error}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # typer ends so when it has caught Ctrl-C
            typer.echo("qhyvit: stopped; nothing half-written was left behind.", err=True)
        raise


if __name__ == "__main__":
    main()
