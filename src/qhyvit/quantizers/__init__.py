"""Number formats: tensor to integer codes and back. A new one is a file here and a line below."""

from __future__ import annotations

from qhyvit.quantizers.adalog import AdaLog
from qhyvit.quantizers.base import Quantizer
from qhyvit.quantizers.log import Log2, LogSqrt2
from qhyvit.quantizers.power_of_two import PowerOfTwoFactor
from qhyvit.quantizers.sulq import ShiftUniformLog2
from qhyvit.quantizers.twin import TwinUniform
from qhyvit.quantizers.uniform import Scheme, UniformAffine, overflows, uniform_from_range
from qhyvit.registry import Registry

QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer")
for _format in (UniformAffine, PowerOfTwoFactor, Log2, LogSqrt2, AdaLog, ShiftUniformLog2, TwinUniform):
    QUANTIZERS.register(_format.kind)(_format)

__all__ = ["QUANTIZERS", "Quantizer", "Scheme", "UniformAffine", "overflows", "uniform_from_range"]
