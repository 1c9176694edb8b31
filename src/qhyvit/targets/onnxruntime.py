"""ONNX Runtime on the CPU: QDQ export, sessions, and a count of what really runs in integers."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from qhyvit.errors import TargetError
from qhyvit.graph.ops import aten, is_call
from qhyvit.quantized import QuantizedModel
from qhyvit.recipe import Recipe
from qhyvit.targets.base import Target
from qhyvit.targets.cpu import saturates
from qhyvit.targets.onnx_lowering import Lowering

# Moving numbers, changing their type, or shape arithmetic: neither an integer nor a float computation.
_NEUTRAL = frozenset(
    {
        *(
            "Cast",
            "Clip",
            "Concat",
            "ConstantOfShape",
            "DepthToSpace",
            "DequantizeLinear",
            "Expand",
            "Flatten",
            "Gather",
        ),
        *("Identity", "Pad", "QuantizeLinear", "ReorderInput", "ReorderOutput", "Reshape", "Shape", "Slice", "Split"),
        *("Squeeze", "Transpose", "Unsqueeze"),
    }
)
_INTEGER = frozenset({"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm"})  # and all called QLinear…


def prepare(recipe: Recipe) -> Recipe:
    """Decide how weights are stored on this processor, so that the written recipe says it.

    "auto" becomes "unsigned" (u8×u8, exact everywhere) where u8×s8 products saturate, else "ignore".
    """
    if recipe.saturation != "auto":
        return recipe
    return recipe.updated(saturation="unsigned" if saturates() else "ignore")


def settle(model: QuantizedModel) -> None:
    """Make 1 / scale whole where softmax runs in integers: the kernel rounds it down, which costs up to a code in ten.

    Such a scale widens the range, by less than one part in the number of codes.
    """
    for name in model.parameters.activations:
        node = model.nodes[name]
        if is_call(node, aten.softmax.int) and model.input_site(node, 0) is not None:
            quantizer = model.parameters.uniform(name)
            inverse = torch.floor(1 / quantizer.scale.double()).clamp(min=1)
            scale = (1 / inverse).float()
            lost = torch.floor(1 / scale) < inverse  # in float32, as the kernel reckons: 1 / (1 / 7) is 6.99…
            quantizer.scale.copy_(torch.where(lost, torch.nextafter(scale, torch.zeros_like(scale)), scale))


def export(model: QuantizedModel, path: Path, quantized: bool = True) -> None:
    """Write the model as ONNX, checked, whole or not at all.

    Raises:
        TargetError: naming an operator that has no ONNX form.
    """
    unsigned = model.recipe.saturation == "unsigned"
    lowering = Lowering(model, quantized=quantized, unsigned_weights=unsigned, target="onnxruntime")
    beside = path.with_name(path.name + ".part")
    try:
        onnx.save(lowering.run(), str(beside))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class OrtSession:
    """An ONNX file loaded with all graph optimisations.

    Args:
        path: the file.
        threads: None: ONNX Runtime's default.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime as ort

        self.path = path
        options = _options(ort, threads)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a kind of its own for each failure
            raise TargetError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from error
        self._input = self._session.get_inputs()[0].name

    def run(self, images: Tensor) -> Tensor:
        """Logits (n, classes) float32 of pictures (n, 3, H, W)."""
        (logits,) = self._session.run(None, {self._input: images.numpy()})
        return torch.from_numpy(logits)

    def operators(self) -> tuple[int, int]:
        """Computing operators of the optimised graph: (integer, float)."""
        kinds = self.optimised_kinds()
        integer = sum(n for kind, n in kinds.items() if _is_integer(kind))
        neutral = sum(n for kind, n in kinds.items() if kind in _NEUTRAL)
        return integer, sum(kinds.values()) - integer - neutral

    def optimised_kinds(self) -> Counter[str]:
        """Operator types of the graph that ONNX Runtime executes."""
        import onnxruntime as ort

        with tempfile.TemporaryDirectory() as folder:
            options = _options(ort, 1)
            options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
            ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
            optimised = onnx.load(options.optimized_model_filepath)
        return Counter(node.op_type for node in optimised.graph.node)


def _options(ort: Any, threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # it warns that an optimised file is for this machine only; ours is a scratch file
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _is_integer(kind: str) -> bool:
    return kind in _INTEGER or kind.startswith("QLinear")


ONNXRUNTIME = Target(
    name="onnxruntime",
    description="ONNX Runtime, CPU: QDQ model; convolutions, linears and attention products in 8-bit integers",
    quantized_outputs=frozenset({"conv"}),
    weight_bits=frozenset(range(2, 9)),
    activation_bits=frozenset(range(2, 9)),
    asymmetric_weights=False,
    per_channel_activations=False,
    formats=frozenset({"uniform"}),
    operators=frozenset(),
    integer_bias=True,
    file_name="model.onnx",
    prepare=prepare,
    settle=settle,
    export=export,
    load=OrtSession,
)
