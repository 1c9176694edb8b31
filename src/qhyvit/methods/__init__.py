"""Methods by name. A new one is a file here and a line below."""

from qhyvit.methods import (
    adalog,
    adaround,
    best,
    brecq,
    easyquant,
    erq,
    fqvit,
    hyq,
    iasvit,
    ptq4vit,
    qdrop,
    qhyvit,
    ranges,
    repqvit,
)
from qhyvit.methods.base import Method, Problem
from qhyvit.registry import Registry

FULLY_INTEGER = ("integer-softmax", "integer-layer-norm")

METHODS: Registry[Method] = Registry("method")

METHODS.register("minmax")(Method(ranges.minmax))
METHODS.register("percentile")(Method(ranges.percentile))
METHODS.register("mse")(Method(ranges.mse))
METHODS.register("kl")(Method(ranges.kl))
METHODS.register("qhyvit")(Method(qhyvit.qhyvit))
METHODS.register("best")(Method(best.best))
METHODS.register("easyquant")(Method(easyquant.easyquant))
METHODS.register("ptq4vit")(Method(ptq4vit.ptq4vit, formats=("twin-uniform",)))
METHODS.register("fqvit")(Method(fqvit.fqvit, formats=("log2", "power-of-two"), operators=FULLY_INTEGER))
METHODS.register("hyq")(Method(hyq.hyq, formats=("log2", "power-of-two"), operators=FULLY_INTEGER))
METHODS.register("adalog")(Method(adalog.adalog, formats=("adalog",)))
METHODS.register("iasvit")(Method(iasvit.iasvit, formats=("sulq",)))
METHODS.register("repqvit")(Method(repqvit.repqvit, formats=("log-sqrt2",)))
METHODS.register("erq")(Method(erq.erq))
METHODS.register("adaround")(Method(adaround.adaround))
METHODS.register("brecq")(Method(brecq.brecq))
METHODS.register("qdrop")(Method(qdrop.qdrop))

__all__ = ["METHODS", "Method", "Problem"]
