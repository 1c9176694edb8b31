"""Where method qhyvit's time goes: seconds of each step, and the peak memory of the process.

    python benchmarks/speed.py mobilevit_xxs --input-size 256 --threads 2
    python benchmarks/speed.py mobilevit_s --input-size 256 --target simulate
    python benchmarks/speed.py mobilevit_xxs --input-size 256 --pictures 64
    python benchmarks/speed.py deit_tiny_patch16_224 --depth 6

W8A8, 32 of the built-in photographs unless told otherwise, all granularities and schemes that the target executes, 3
rounds. Weights are random unless --weights names some: time hardly depends on them. Steps that others contain are
indented.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import timm
import torch

from qhyvit import pipeline
from qhyvit.methods import qhyvit as method
from qhyvit.models.load import load_model
from qhyvit.search.layers import LayerSearch

STEPS: list[tuple[Any, str, str]] = [
    (pipeline, "capture", "capture"),
    (method, "_even_out", "even out channels"),
    (method, "equalise_streams", "  streams"),
    (method, "balance_all", "  single values"),
    (method, "set_ranges", "statistics and start ranges"),
    (method, "gather", "sampling (part of it in evening out)"),
    (LayerSearch, "layers", "search: layers"),
    (LayerSearch, "_products", "search: products"),
    (LayerSearch, "_value", "search: single values"),
    (method, "reconstruct_bridges", "bridge blocks"),
    (pipeline, "correct_biases", "biases"),
]


def main() -> None:
    """Quantize once, with a clock around each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--input-size", type=int)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--depth", type=int, help="blocks of a timm transformer, instead of its own number")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spent = {label: [0.0, 0.0] for _, _, label in STEPS}
    for owner, name, label in STEPS:
        setattr(owner, name, _timed(getattr(owner, name), spent[label]))
    net = timm.create_model(args.model, depth=args.depth) if args.depth else args.model
    loaded = load_model(net, weights=args.weights, input_size=args.input_size)
    wall, cpu = time.perf_counter(), time.process_time()
    quantized = pipeline.quantize(
        loaded, calib="photos", method="qhyvit", target=args.target, calibration={"size": args.pictures}
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"| step | wall s | CPU s |\n|---|---:|---:|\n| all of {args.model} | {wall:.1f} | {cpu:.1f} |")
    for label, (w, c) in spent.items():
        print(f"| {label} | {w:.1f} | {c:.1f} |")
    layers, values = len(quantized.sites.weights), len(quantized.sites.activations)
    print(f"\n{layers} layers, {values} values; peak memory: {_peak_mb():.0f} MB; threads: {args.threads}")


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - wall
            spent[1] += time.process_time() - cpu

    return run


def _peak_mb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
