"""Integer forms of operators that runtimes compute in float. A new one is a file here and a line below."""

from __future__ import annotations

from qhyvit.operators.base import IntegerOperator
from qhyvit.operators.layer_norm import IntegerLayerNorm
from qhyvit.operators.softmax import IntegerSoftmax
from qhyvit.registry import Registry

OPERATORS: Registry[type[IntegerOperator]] = Registry("integer operator")
for _operator in (IntegerSoftmax, IntegerLayerNorm):
    OPERATORS.register(_operator.kind)(_operator)

__all__ = ["OPERATORS", "IntegerLayerNorm", "IntegerOperator", "IntegerSoftmax"]
