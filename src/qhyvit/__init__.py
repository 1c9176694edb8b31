"""Post-training quantization of hybrid vision transformers, down to an integer model that really runs.

import qhyvit

quantized = qhyvit.quantize("mobilevit_xxs", weights="net.safetensors", calib="photos/", bits="w8a8")
qhyvit.save(quantized, "out/")                  # recipe, integer weights, model.onnx
qhyvit.verify(quantized, "val/")                # the exported model against its simulation
qhyvit.evaluate(quantized, "val/")              # float, simulated, deployed
qhyvit.losses(quantized, "val/")                # what each operator loses, the worst first
quantized = qhyvit.load("out/")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qhyvit.comparison.run import compare
    from qhyvit.data.dataset import open_dataset
    from qhyvit.diagnosis import losses
    from qhyvit.errors import QhyvitError
    from qhyvit.evaluation import evaluate
    from qhyvit.latency import bench
    from qhyvit.models.load import load_model
    from qhyvit.pipeline import export, quantize
    from qhyvit.recipe import Recipe
    from qhyvit.store import load, save
    from qhyvit.verification import verify

__version__ = "0.1.0"

# Imported when first used: torch takes seconds to load, and `qhyvit --help` needs none of it.
_HOME = {
    "QhyvitError": "errors",
    "Recipe": "recipe",
    "bench": "latency",
    "compare": "comparison.run",
    "evaluate": "evaluation",
    "export": "pipeline",
    "load": "store",
    "load_model": "models.load",
    "losses": "diagnosis",
    "open_dataset": "data.dataset",
    "quantize": "pipeline",
    "save": "store",
    "verify": "verification",
}

__all__ = [
    "QhyvitError",
    "Recipe",
    "bench",
    "compare",
    "evaluate",
    "export",
    "load",
    "load_model",
    "losses",
    "open_dataset",
    "quantize",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qhyvit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qhyvit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
