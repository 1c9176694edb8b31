"""Targets by name. A new runtime is a file here and a line below."""

from qhyvit.registry import Registry
from qhyvit.targets.base import Session, Target
from qhyvit.targets.onnxruntime import ONNXRUNTIME
from qhyvit.targets.simulate import SIMULATE

TARGETS: Registry[Target] = Registry("target")

TARGETS.register("onnxruntime")(ONNXRUNTIME)
TARGETS.register("simulate")(SIMULATE)

__all__ = ["TARGETS", "Session", "Target"]
