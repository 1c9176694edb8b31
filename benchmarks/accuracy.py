"""Accuracy of methods at several widths on one net: mean and spread over calibration draws.

    python benchmarks/accuracy.py mobilevit_xxs --weights net.safetensors --calib train.zip --data val.zip \
        --bits w8a8,w6a6,w4a8,w4a4 --methods mse,qhyvit --seeds 3

A method may carry options: `qhyvit:gradient=fisher:balance=false`. All rows see the same pictures: each seed draws its
own --calib-size pictures, the same for every method. Prints a Markdown table: top-1 of float, then top-1, agreement
with the float net's top-1, and SQNR of the logits of the simulation, mean ± standard deviation, and seconds.
--stress adds rows for twins (docs/stress.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import torch
import yaml

from qhyvit.data.preprocessing import Preprocessing
from qhyvit.evaluation import evaluate
from qhyvit.graph.capture import capture
from qhyvit.models.load import LoadedModel, load_model
from qhyvit.pipeline import quantize


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--weights")
    parser.add_argument("--calib")
    parser.add_argument("--data")
    parser.add_argument("--bits", default="w8a8,w6a6,w4a8,w4a4")
    parser.add_argument("--methods", default="minmax,percentile,mse,qhyvit")
    parser.add_argument("--stress", default="none", help="twins to quantize too: none,ranges:30,shift,both:30")
    parser.add_argument("--scope", default="partial")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calib-size", type=int, default=32)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print("| stress | bits | method | float top-1 | top-1 | agreement | SQNR dB | seconds |")
    print("|---|---|---|---:|---:|---:|---:|---:|", flush=True)
    for stress in args.stress.split(","):
        _grid(args, stress, load_model(args.model, weights=args.weights, stress=None if stress == "none" else stress))


def _grid(args: argparse.Namespace, stress: str, loaded: LoadedModel) -> None:
    """All widths and methods on one net, captured once."""
    size = Preprocessing.from_config(loaded.preprocessing_config).input_size
    loaded = replace(loaded, module=capture(loaded.module, torch.zeros(1, *size)))
    for bits in args.bits.split(","):
        for name in args.methods.split(","):
            method, *given = name.split(":")
            options: dict[str, Any] = {k: yaml.safe_load(v) for k, v in (g.split("=") for g in given)}
            rows, started = [], time.perf_counter()
            for seed in range(args.seeds):
                quantized = quantize(
                    loaded,
                    calib=args.calib,
                    bits=bits,
                    method=method,
                    scope=args.scope,
                    target=args.target,
                    seed=seed,
                    options=options,
                    calibration={"size": args.calib_size},
                )
                seconds = time.perf_counter() - started
                scores = evaluate(quantized, args.data, limit=args.limit, deployed=False)
                started = time.perf_counter()
                print(f"{stress} {bits} {name} seed {seed}: {scores['simulated']}", file=sys.stderr, flush=True)
                rows.append((scores["float"], scores["simulated"], seconds))
            cells = [
                _spread([100 * s.top1 for _, s, _ in rows], "%"),
                _spread([100 * s.agreement for _, s, _ in rows], "%"),
                _spread([s.sqnr_db for _, s, _ in rows], ""),
                f"{mean(r[2] for r in rows):.0f}",
            ]
            print(f"| {stress} | {bits} | {name} | {100 * rows[0][0].top1:.2f} % | {' | '.join(cells)} |", flush=True)


def _spread(values: list[float], unit: str) -> str:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.2f} ± {deviation:.2f}{' ' + unit if unit else ''}"


if __name__ == "__main__":
    main()
