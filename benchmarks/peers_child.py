"""One process of peers.py: `python peers_child.py JOB`, a JSON file with role, folder and settings.

Writes `result.json` into the folder. A refusal is one line on standard error.
"""

from __future__ import annotations

import importlib
import json
import math
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
IMPORTS = {
    "qhyvit-mse": (*COMMON, *EXPORT, "qhyvit.pipeline"),
    "qhyvit-minmax": (*COMMON, *EXPORT, "qhyvit.pipeline"),
    "ort": (*COMMON, *EXPORT, "onnxscript", "onnxruntime.quantization.shape_inference"),
    "ort-legacy": (*COMMON, "onnxruntime.quantization.shape_inference"),
    "nncf": (*COMMON, "openvino", "nncf"),
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


def ort_static(loaded: Any, pictures: Any, home: Path, *, dynamo: bool) -> Quantized:
    """ONNX Runtime's static quantization as its documentation advises for x86: QDQ, U8S8, per channel, min-max."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        def __init__(self) -> None:
            self.rest = iter(pictures)

        def get_next(self) -> dict[str, Any] | None:
            picture = next(self.rest, None)
            return None if picture is None else {"images": picture[None]}

    seconds = _torch_export(loaded, pictures, home / "float.onnx", dynamo=dynamo)
    quant_pre_process(str(home / "float.onnx"), str(home / "prepared.onnx"))
    quantize_static(
        str(home / "prepared.onnx"),
        str(home / "int8.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    return seconds, lambda: None


def nncf_openvino(loaded: Any, pictures: Any, home: Path) -> Quantized:
    """NNCF's post-training quantization with the settings that it has for transformers.

    OpenVINO converts an ONNX file of the TorchScript exporter here, which takes a third of the time of its own way from
    a torch module.
    """
    import nncf
    import openvino

    start = time.perf_counter()
    _torch_export(loaded, pictures, home / "float.onnx", dynamo=False)
    converted = openvino.convert_model(home / "float.onnx")
    seconds = time.perf_counter() - start
    data = nncf.Dataset(pictures, lambda picture: picture[None])
    model = nncf.quantize(converted, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pictures))
    openvino.save_model(model, home / "int8.xml", compress_to_fp16=False)
    return seconds, lambda: openvino.save_model(
        openvino.convert_model(home / "float.onnx"), home / "float.xml", compress_to_fp16=False
    )


QUANTIZE: dict[str, Callable[[Any, Any, Path], Quantized]] = {
    "qhyvit-mse": lambda *given: qhyvit(*given, method="mse"),
    "qhyvit-minmax": lambda *given: qhyvit(*given, method="minmax"),
    "ort": lambda *given: ort_static(*given, dynamo=True),
    "ort-legacy": lambda *given: ort_static(*given, dynamo=False),
    "nncf": nncf_openvino,
}


Run = Callable[[Any], Any]  # pictures float32 (1, 3, H, W) → logits (1, classes), on one thread


def evaluate(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """All deployed files and their float counterparts: error against the float module, size and latency."""
    import numpy as np

    names = settings["only"]
    images, logits = np.load(folder / "evaluation.npy"), np.load(folder / "logits.npy")
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


def open_file(home: Path, stem: str) -> Run:
    """An ONNX file in ONNX Runtime, or OpenVINO's own in OpenVINO; float means 32 bits, not bfloat16, in both."""
    if (home / f"{stem}.xml").is_file():
        import openvino

        options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(home / f"{stem}.xml", "CPU", options)
        request = compiled.create_infer_request()
        return lambda image: request.infer([image])[0]
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = 1
    chosen.log_severity_level = 3
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(home / f"{stem}.onnx"), chosen, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name
    return lambda image: session.run(None, {entry: image})[0]


def errors(run: Run, images: Any, logits: Any) -> dict[str, float]:
    """SQNR in dB and top-1 agreement of logits (n, classes) with those of the float module."""
    import numpy as np

    outputs = np.concatenate([np.array(run(images[i : i + 1])) for i in range(len(images))])
    noise = float(np.square(outputs.astype(np.float64) - logits).sum())
    signal = float(np.square(logits.astype(np.float64)).sum())
    agreement = float((outputs.argmax(1) == logits.argmax(1)).mean())
    return {"sqnr_db": 10 * math.log10(signal / max(noise, 1e-30)), "top1_agreement": agreement}


def latencies(runs: dict[str, Run], image: Any) -> dict[str, float]:
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
