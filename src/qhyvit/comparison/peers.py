"""Other quantizers to compare with. A new one is a function and an entry here.

A peer is given a float ONNX file and preprocessed pictures, and writes the file that it deploys; scores are of that
file in its own runtime. `compare` takes the float file from the captured graph (`write_float`), so that all start from
the same net, twins too.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from qhyvit.errors import QhyvitError
from qhyvit.graph.sites import Sites
from qhyvit.pipeline import export
from qhyvit.quantized import Parameters, QuantizedModel
from qhyvit.recipe import Recipe
from qhyvit.registry import Registry
from qhyvit.targets.cpu import saturates
from qhyvit.targets.onnxruntime import OrtSession

BITS = "w8a8"  # all that peers quantize to
Pictures = npt.NDArray[np.float32]
Run = Callable[[Tensor], Tensor]  # pictures (n, 3, H, W) float32 → logits (n, classes) float32


class Written(NamedTuple):
    """The file that a peer deploys, and how it was asked to make it, for the table's notes."""

    file: Path
    note: str


@dataclass(frozen=True)
class Peer:
    """Another quantizer.

    Attributes:
        name: in the table.
        quantize: (float ONNX file, pictures (n, 3, H, W), folder to write into, the recipe's saturation as
            `prepare` of target onnxruntime decided it) → `Written`, whose file is called int8.
        open: (file, threads) → what runs a file of its kind, float or integer; threads None: as the runtime chooses.
        packages: what it needs beside qhyvit's own dependencies.
        runtime: the package that runs its files.
    """

    name: str
    quantize: Callable[[Path, Pictures, Path, str], Written]
    open: Callable[[Path, int | None], Run]
    packages: tuple[str, ...]
    runtime: str

    def check(self) -> None:
        """Refuse if a package is missing.

        Raises:
            QhyvitError: names the packages and how to install them.
        """
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            raise QhyvitError(
                f"{self.name} needs {' and '.join(missing)}, not installed here: pip install qhyvit[peers]."
            )

    def versions(self) -> dict[str, str]:
        """Of the packages that decide its result."""
        return {package: version(package) for package in sorted({*self.packages, self.runtime})}

    def prepare(
        self, graph: fx.GraphModule, pictures: Pictures, folder: Path, saturation: str
    ) -> Callable[[], Written]:
        """What is done before the clock starts: packages imported, float file written. Call the result to quantize.

        Raises:
            QhyvitError: if a package is missing or the graph has no ONNX form. The result raises it, with the peer's
                own reason, where the peer fails.
        """
        self.check()
        with _quiet():
            for package in (*self.packages, "onnxruntime.quantization.shape_inference"):
                importlib.import_module(package)
        file = write_float(graph, folder / "float.onnx")

        def run() -> Written:
            try:
                with _quiet(), redirect_stdout(io.StringIO()):  # progress bars
                    return self.quantize(file, pictures, folder, saturation)
            except Exception as error:  # of whatever kind the peer raises
                reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
                raise QhyvitError(f"{self.name} cannot quantize this net: {reason}") from error

        return run


def write_float(graph: fx.GraphModule, path: Path) -> Path:
    """A captured graph (N, 3, H, W) → logits as a float ONNX file with a free batch dimension.

    Raises:
        TargetError: naming an operator that has no ONNX form.
    """
    return export(QuantizedModel(graph, Sites((), ()), Parameters(), Recipe(), {}), path, quantized=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings on what the user can do nothing about; errors are still seen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ONNX Runtime ------------------------------------------------------------------------------------------------------

# The recipe's saturation → signed weights, one bit less, in words.
_ORT_WEIGHTS = {
    "ignore": (True, False, "int8 weights"),
    "reduce-range": (True, True, "7-bit weights (reduce_range, against saturation on x86 without VNNI)"),
    "unsigned": (False, False, "uint8 symmetric weights (against saturation on x86 without VNNI)"),
}


class _Reader:
    """Pictures one by one, as `quantize_static` takes them."""

    def __init__(self, entry: str, pictures: Pictures) -> None:
        self.entry, self.rest = entry, iter(pictures)

    def get_next(self) -> dict[str, Pictures] | None:
        picture = next(self.rest, None)
        return None if picture is None else {self.entry: picture[None]}


def quantize_static(float_file: Path, pictures: Pictures, folder: Path, saturation: str) -> Written:
    """ONNX Runtime's static quantization as its documentation advises for x86: QDQ, uint8 activations, min-max."""
    import onnx
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    signed, reduce_range, words = _ORT_WEIGHTS[saturation]
    prepared, file = folder / "prepared.onnx", folder / "int8.onnx"
    quant_pre_process(str(float_file), str(prepared))
    ort.quantize_static(
        str(prepared),
        str(file),
        _Reader(onnx.load(prepared, load_external_data=False).graph.input[0].name, pictures),
        quant_format=ort.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=ort.QuantType.QUInt8,
        weight_type=ort.QuantType.QInt8 if signed else ort.QuantType.QUInt8,
        calibrate_method=ort.CalibrationMethod.MinMax,
        extra_options={"WeightSymmetric": True},  # the default of signed ones
    )
    return Written(file, f"quantize_static: min-max, QDQ, uint8 activations, {words} per channel, run by ONNX Runtime.")


def open_onnx(file: Path, threads: int | None) -> Run:
    """An ONNX file in ONNX Runtime.

    Raises:
        TargetError: if it cannot be loaded.
    """
    return OrtSession(file, threads).run


# NNCF --------------------------------------------------------------------------------------------------------------


def nncf_ptq(float_file: Path, pictures: Pictures, folder: Path, saturation: str) -> Written:
    """NNCF's post-training quantization with the settings that it has for transformers.

    Against saturation it halves the range of the first layer's weights, by default and on every processor; its authors
    advise to leave it at that on x86 without VNNI, so `saturation` changes nothing. Products of two activations have no
    such guard.
    """
    import nncf
    import openvino

    data = nncf.Dataset(pictures, lambda picture: picture[None])
    converted = openvino.convert_model(float_file)
    model = nncf.quantize(converted, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pictures))
    file = folder / "int8.xml"
    openvino.save_model(model, file, compress_to_fp16=False)
    note = (
        "NNCF: model_type TRANSFORMER, else its defaults (half the range in the first layer's weights, against "
        "saturation), run by OpenVINO"
    )
    return Written(
        file, f"{note}, whose 8-bit sums saturate on this processor (no VNNI)." if saturates() else f"{note}."
    )


def open_openvino(file: Path, threads: int | None) -> Run:
    """An OpenVINO or ONNX file in OpenVINO; float means 32 bits, not bfloat16.

    Pictures are run one by one, as a device does: without VNNI, OpenVINO 2026.4 gives other logits for the same picture
    in a batch of 24 than alone.
    """
    import openvino

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    request = openvino.Core().compile_model(file, "CPU", options).create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(np.concatenate([request.infer([picture])[0] for picture in images.numpy()[:, None]]))

    return run


PEERS: Registry[Peer] = Registry("peer")

for _peer in (
    Peer("ort-quantize-static", quantize_static, open_onnx, (), "onnxruntime"),
    Peer("nncf-ptq", nncf_ptq, open_openvino, ("nncf", "openvino"), "openvino"),
):
    PEERS.register(_peer.name)(_peer)
