"""Number formats: tensor to integer codes and back."""

from __future__ import annotations

from typing import Any

from qhyvit.quantizers.uniform import Scheme, UniformAffine, overflows, uniform_from_range
from qhyvit.registry import Registry

QUANTIZERS: Registry[type[Any]] = Registry("quantizer")
QUANTIZERS.register("uniform")(UniformAffine)

__all__ = ["QUANTIZERS", "Scheme", "UniformAffine", "overflows", "uniform_from_range"]
