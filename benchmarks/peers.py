"""The same net, quantized from the same pictures by qhyvit, ONNX Runtime and NNCF: seconds, memory and what comes out.

    pip install qhyvit[peers]
    python benchmarks/peers.py --weights mobilevit_xxs.safetensors --out peers.json > peers.md

Each contestant runs in a process of its own, one after the other, as often as --repeats says, taking turns. Wall and
CPU seconds begin with the float PyTorch module in memory and end with the deployable file on disk; imports are counted
apart. All read the same preprocessed pictures from one file. Then one process runs all files on other pictures: against
the float module for the error, on one thread and taking turns for the latency. The table goes to standard output.

This file imports the standard library alone; what the processes do is in peers_child.py. So the parent stays small: on
Linux a child's peak memory is never below that of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

# name → title, packages beside qhyvit's own
CONTESTANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "qhyvit-mse": ("qhyvit, mse", ()),
    "qhyvit-minmax": ("qhyvit, minmax", ()),
    "ort": ("ONNX Runtime, dynamo exporter", ("onnxscript",)),
    "ort-legacy": ("ONNX Runtime, TorchScript exporter", ()),
    "nncf": ("NNCF, OpenVINO", ("openvino", "nncf")),
}
PACKAGES = ("qhyvit", "torch", "timm", "onnx", "onnxruntime", "onnxscript", "openvino", "nncf")
CHILD = Path(__file__).with_name("peers_child.py")


def main() -> None:
    """Parse the command line, run everything, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mobilevit_xxs", help="as for `qhyvit quantize`; 'demo' for the demo net")
    parser.add_argument("--weights", help="weights file of the model; random weights without it")
    parser.add_argument("--input-size", type=int, help="side of the pictures; default: 256, the demo net's own size")
    parser.add_argument("--pictures", type=int, default=128, help="to calibrate with, and at most as many to evaluate")
    parser.add_argument("--calib", help="calibration pictures; default: the built-in ones")
    parser.add_argument("--data", help="evaluation pictures; default: the built-in ones, other than those to calibrate")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contestant; medians are reported")
    parser.add_argument("--threads", type=int, help="cores each contestant may use; default: all, as it chooses")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="JSON with every run")
    args = parser.parse_args()
    if min(args.pictures, args.repeats, args.threads or 1, args.input_size or 1) < 1:
        parser.error("--pictures, --repeats, --threads and --input-size must be at least 1")
    missing = sorted({p for name in args.only for p in CONTESTANTS[name][1] if not find_spec(p)})
    if missing:
        sys.exit(f"{' and '.join(missing)} not installed: pip install qhyvit[peers], or leave them out with --only.")
    if args.input_size is None and args.model != "demo":
        args.input_size = 256
    with tempfile.TemporaryDirectory(prefix="qhyvit-peers-") as scratch:
        result = _run(args, Path(scratch))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def _run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    say("Preparing pictures")
    facts = call(folder, settings, "prepare")
    if "error" in facts:
        sys.exit(facts["error"])
    facts |= {"machine": machine(), "versions": {"Python": platform.python_version()} | dict(versions())}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    failed: dict[str, str] = {}
    for turn in range(args.repeats):
        for name in args.only:
            if name in failed:
                continue
            load = os.getloadavg()[0]
            run = call(folder, settings, name)
            if "error" in run:
                failed[name] = run["error"]
                say(f"{turn + 1}/{args.repeats} {name}: failed, {run['error']}")
                continue
            runs[name].append(run | {"load_average_before": load})
            say(f"{turn + 1}/{args.repeats} {name}: {run['wall_s']:.1f} s, CPU {run['cpu_s']:.1f} s, load {load:.1f}")
    settings["only"] = [name for name in args.only if runs[name] and name not in failed]
    say("Evaluating")
    measured = call(folder, settings, "evaluate")
    if "error" in measured:
        sys.exit(measured["error"])
    return {"settings": settings, "facts": facts, "runs": runs, "failed": failed} | measured


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def call(folder: Path, settings: dict[str, Any], role: str) -> dict[str, Any]:
    """Run one role in a process of its own; what it found, or {"error": one line}."""
    job, result, log = folder / "job.json", folder / "result.json", folder / f"{role}.log"
    result.unlink(missing_ok=True)
    job.write_text(json.dumps({"role": role, "folder": str(folder), "settings": settings}))
    environment = dict(os.environ, TMPDIR=str(folder), TQDM_DISABLE="1")
    if settings["threads"]:
        environment["OMP_NUM_THREADS"] = str(settings["threads"])
    with log.open("w") as file:
        command = [sys.executable, str(CHILD), str(job)]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode == 0 and result.is_file():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "no message")
    return {"error": last.strip() if done.returncode > 0 else f"stopped by signal {-done.returncode}"}


def machine() -> str:
    """The processor and how many of its cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    called = name[1] if name else platform.processor() or "processor"
    return f"{called}, {platform.machine()}, {cores} cores, {platform.system()}"


def versions() -> Iterator[tuple[str, str]]:
    """Installed packages and their versions."""
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def table(result: dict[str, Any]) -> str:
    """The Markdown table and the conditions it was measured under."""
    facts, settings = result["facts"], result["settings"]
    loads = [run["load_average_before"] for runs in result["runs"].values() for run in runs]
    busy = f"load average before the runs {min(loads):.1f} to {max(loads):.1f}" if loads else "nothing ran"
    kernels = "pairs of u8×s8 products saturate (no VNNI)" if facts["saturates"] else "exact u8×s8 sums (VNNI)"
    lines = [
        f"{settings['model']} at {facts['input_size'][1]}×{facts['input_size'][2]}, {facts['source']}. Pictures: "
        f"{'; '.join(facts['pictures'].values())}. Medians of {settings['repeats']} runs, threads "
        f"{settings['threads'] or 'as each chooses'}, {busy}.",
        "",
        f"{facts['machine']}, {kernels}. " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".",
        "",
        "| contestant | wall s | of it float export | CPU s | imports s | peak MB | file MB | SQNR dB "
        + "| top-1 agreement | int8 ms | × float file, peer's | × float file, qhyvit's |",
        "|---|" + "---:|" * 11,
    ]
    for name, runs in result["runs"].items():
        title = CONTESTANTS[name][0]
        if name in result["failed"]:
            lines.append(f"| {title} | failed: {result['failed'][name]} |" + " |" * 10)
            continue
        middle = {key: median(run[key] for run in runs) for key in ("wall_s", "cpu_s", "imports_s", "peak_mb")}
        export = f"{median(run['export_s'] for run in runs):.1f}" if runs[0]["export_s"] is not None else "none"
        deployed = result["deployed"][name]
        factors = (f"{f:.2f}" if f else "" for f in (deployed["speedup_peer_float"], deployed["speedup_own_float"]))
        lines.append(
            f"| {title} | {middle['wall_s']:.1f} | {export} | {middle['cpu_s']:.1f} | {middle['imports_s']:.1f} "
            f"| {middle['peak_mb']:.0f} | {deployed['file_mb']:.2f} | {deployed['sqnr_db']:.1f} "
            f"| {deployed['top1_agreement']:.3f} | {deployed['latency_ms']:.2f} | " + " | ".join(factors) + " |"
        )
    floats = "; ".join(f"{k}: {v['latency_ms']:.2f} ms, {v['sqnr_db']:.0f} dB" for k, v in result["float"].items())
    return "\n".join([*lines, "", f"Float files: {floats}. Latency: one picture, one thread, CPU time."])


if __name__ == "__main__":
    main()
