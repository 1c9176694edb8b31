"""Methods by name. A new one is a file here and a line below."""

from qhyvit.methods import qhyvit, ranges
from qhyvit.methods.base import Method, Problem
from qhyvit.registry import Registry

METHODS: Registry[Method] = Registry("method")

METHODS.register("minmax")(ranges.minmax)
METHODS.register("percentile")(ranges.percentile)
METHODS.register("mse")(ranges.mse)
METHODS.register("kl")(ranges.kl)
METHODS.register("qhyvit")(qhyvit.qhyvit)

__all__ = ["METHODS", "Method", "Problem"]
