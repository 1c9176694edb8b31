"""One process of peers.py: `python peers_child.py JOB`, a JSON file with role, folder and settings.

Writes `result.json` into the folder. A refusal is one line on standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# Imported before the clock starts: what the contestant needs, also where it would import it later by itself.
COMMON = ("torch", "timm", "qhyvit.models.load", "onnx")
EXPORT = ("torch.export", "torch._dynamo")
PEER = (*COMMON, "qhyvit.comparison.peers")
IMPORTS = {
    "qhyvit-mse": (*COMMON, *EXPORT, "qhyvit.pipeline"),
    "qhyvit-minmax": (*COMMON, *EXPORT, "qhyvit.pipeline"),
    "ort": (*PEER, *EXPORT, "onnxscript", "onnxruntime.quantization.shape_inference"),
    "ort-legacy": (*PEER, "onnxruntime.quantization.shape_inference"),
    "nncf": (*PEER, "openvino", "nncf"),
}
# The float file that stands beside a contestant's integer file.
FLOATS = {
    "qhyvit-mse": "qhyvit",
    "qhyvit-minmax": "qhyvit",
    "ort": "torch.onnx dynamo",
    "ort-legacy": "torch.onnx TorchScript",
    "nncf": "OpenVINO",
}
WARM_UP, LATENCY_RUNS = 5, 51


def main(path: Path) -> None:
    """Do one job."""
    from qhyvit.errors import QhyvitError

    warnings.filterwarnings("ignore")
    job = json.loads(path.read_text())
    role, folder, settings = job["role"], Path(job["folder"]), job["settings"]
    if settings["threads"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["threads"]])
    try:
        if role == "prepare":
            found = prepare(folder, settings)
        elif role == "evaluate":
            found = evaluate(folder, settings)
        else:
            found = contest(role, folder, settings)
    except QhyvitError as error:
        sys.exit(str(error))
    (folder / "result.json").write_text(json.dumps(found))


def load(settings: dict[str, Any]) -> Any:
    """The float model, the same in each process."""
    from qhyvit.models.load import load_model

    return load_model(settings["model"], weights=settings["weights"], input_size=settings["input_size"])


def prepare(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write both halves of the pictures, preprocessed, and the float module's logits."""
    import numpy as np
    import torch

    from qhyvit.data.dataset import Part, open_dataset
    from qhyvit.data.preprocessing import Preprocessing
    from qhyvit.pipeline import default_data
    from qhyvit.targets.cpu import saturates

    loaded = load(settings)
    preprocessing = Preprocessing.from_config(loaded.preprocessing_config)
    parts: tuple[tuple[Part, str | None], ...] = (("calibration", settings["calib"]), ("evaluation", settings["data"]))
    used, logits = {}, []
    for part, given in parts:
        data = open_dataset(given, part) if given else default_data(loaded, part)
        batches = [b.images for b in data.shuffled(0).batches(preprocessing, 16, settings["pictures"])]
        np.save(folder / f"{part}.npy", torch.cat(batches).numpy())
        used[part] = f"{sum(map(len, batches))} of {data.name}"
        if part == "evaluation":
            with torch.inference_mode():
                logits = [loaded.module(images) for images in batches]
    np.save(folder / "logits.npy", torch.cat(logits).numpy())
    return {
        "input_size": preprocessing.input_size,
        "source": re.sub(r"\S*/", "", loaded.source),  # the folder is nobody's business
        "pictures": used,
        "saturates": saturates(),
    }


def contest(name: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize once; seconds, and peak memory in MB (decimal, of the whole process)."""
    start = time.perf_counter()
    for module in IMPORTS[name]:
        importlib.import_module(module)
    imports = time.perf_counter() - start
    import numpy as np

    loaded = load(settings)
    pictures = np.load(folder / "calibration.npy", mmap_mode="c")
    home = folder / name
    home.mkdir(exist_ok=True)
    before = peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    export, finish = QUANTIZE[name](loaded, pictures, home)
    found = {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "export_s": export,
        "imports_s": imports,
        "peak_mb": peak_mb(),
        "peak_mb_before": before,
    }
    finish()
    return found


def peak_mb() -> float:
    """Largest resident size of this process so far, in MB; NaN where the system does not tell."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1e-6 if sys.platform == "darwin" else 1024e-6)


Quantized = tuple[float | None, Callable[[], Any]]  # seconds of the float export, and what is left to do untimed


def qhyvit(loaded: Any, pictures: Any, home: Path, *, method: str) -> Quantized:
    """W8A8 for ONNX Runtime, everything else as by default. The float model is written for the latency alone."""
    import torch

    from qhyvit.pipeline import export, quantize

    model = quantize(loaded, calib=torch.from_numpy(pictures), method=method, calibration={"size": len(pictures)})
    export(model, home / "int8.onnx")
    return None, lambda: export(model, home / "float.onnx", quantized=False)


def _torch_export(loaded: Any, pictures: Any, path: Path, *, dynamo: bool) -> float:
    import torch

    start = time.perf_counter()
    # external_data: one file is what the dynamo exporter writes then
    torch.onnx.export(
        loaded.module,
        (torch.from_numpy(pictures[:1]),),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamo=dynamo,
        external_data=False,
    )
    return time.perf_counter() - start


def by_peer(name: str, loaded: Any, pictures: Any, home: Path, *, dynamo: bool) -> Quantized:
    """Another quantizer, with the settings of `qhyvit compare --peers`, from a file of `torch.onnx.export`.

    OpenVINO converts an ONNX file of the TorchScript exporter, which takes a third of the time of its own way from a
    torch module.
    """
    from qhyvit.comparison.peers import PEERS
    from qhyvit.recipe import Recipe
    from qhyvit.targets.onnxruntime import prepare

    seconds = _torch_export(loaded, pictures, home / "float.onnx", dynamo=dynamo)
    PEERS[name].quantize(home / "float.onnx", pictures, home, prepare(Recipe()).saturation)
    return seconds, lambda: None


def by_nncf(loaded: Any, pictures: Any, home: Path) -> Quantized:
    """NNCF; OpenVINO's float model is written for the latency alone."""
    import openvino

    seconds, _ = by_peer("nncf-ptq", loaded, pictures, home, dynamo=False)
    return seconds, lambda: openvino.save_model(
        openvino.convert_model(home / "float.onnx"), home / "float.xml", compress_to_fp16=False
    )


QUANTIZE: dict[str, Callable[[Any, Any, Path], Quantized]] = {
    "qhyvit-mse": lambda *given: qhyvit(*given, method="mse"),
    "qhyvit-minmax": lambda *given: qhyvit(*given, method="minmax"),
    "ort": lambda *given: by_peer("ort-quantize-static", *given, dynamo=True),
    "ort-legacy": lambda *given: by_peer("ort-quantize-static", *given, dynamo=False),
    "nncf": by_nncf,
}


def evaluate(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """All deployed files and their float counterparts: error against the float module, size and latency."""
    import numpy as np
    import torch

    names = settings["only"]
    images, logits = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("evaluation", "logits"))
    runs = {name: open_file(folder / name, "int8") for name in names}
    runs |= {FLOATS[name]: open_file(folder / name, "float") for name in names}
    latency = latencies(runs, images[:1])
    found: dict[str, dict[str, float | None]] = {
        key: {**errors(run, images, logits), "latency_ms": latency[key]} for key, run in runs.items()
    }
    exported = [latency[key] for key in ("torch.onnx dynamo", "torch.onnx TorchScript") if key in runs]
    for name in names:
        is_openvino = FLOATS[name] == "OpenVINO"
        peer = latency["OpenVINO"] if is_openvino else min(exported, default=None)
        own = None if is_openvino else latency.get("qhyvit")
        found[name] |= {
            "file_mb": sum(f.stat().st_size for f in (folder / name).glob("int8.*")) / 1e6,
            "speedup_peer_float": peer and peer / latency[name],
            "speedup_own_float": own and own / latency[name],
        }
    return {"deployed": {k: found.pop(k) for k in names}, "float": found}


def open_file(home: Path, stem: str) -> Any:
    """An ONNX file in ONNX Runtime, or OpenVINO's own in OpenVINO: pictures → logits, on one thread."""
    from qhyvit.comparison.peers import open_onnx, open_openvino

    file = home / f"{stem}.xml"
    return open_openvino(file, 1) if file.is_file() else open_onnx(home / f"{stem}.onnx", 1)


def errors(run: Any, images: Any, logits: Any) -> dict[str, float | None]:
    """SQNR in dB and top-1 agreement of logits (n, classes) with those of the float module."""
    from qhyvit.evaluation import Tally

    tally = Tally()
    for picture, expected in zip(images.split(1), logits.split(1), strict=True):
        tally.update(run(picture), None, expected)
    return {"sqnr_db": tally.sqnr_db, "top1_agreement": tally.agreement}


def latencies(runs: dict[str, Any], image: Any) -> dict[str, float]:
    """Median CPU milliseconds for one picture, of all files in turn, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {key: [] for key in runs}
    for turn in range(WARM_UP + LATENCY_RUNS):
        for key, run in runs.items():
            start = time.process_time()
            run(image)
            if turn >= WARM_UP:
                times[key].append(time.process_time() - start)
    return {key: 1000 * median(taken) for key, taken in times.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
