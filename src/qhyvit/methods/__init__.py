"""Methods by name. A new one is a file here and a line below."""

from qhyvit.methods import qhyvit, ranges, repqvit
from qhyvit.methods.base import Method, Problem
from qhyvit.registry import Registry

METHODS: Registry[Method] = Registry("method")

METHODS.register("minmax")(Method(ranges.minmax))
METHODS.register("percentile")(Method(ranges.percentile))
METHODS.register("mse")(Method(ranges.mse))
METHODS.register("kl")(Method(ranges.kl))
METHODS.register("qhyvit")(Method(qhyvit.qhyvit))
METHODS.register("repqvit")(Method(repqvit.repqvit, formats=("log-sqrt2",)))

__all__ = ["METHODS", "Method", "Problem"]
