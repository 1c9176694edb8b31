"""Readers that 0 breaks: divisors, reciprocals, inverse roots, logarithms.

A code may stand for 0 where the number was only small. Linear attention divides by a sum that can be that small: 0 / 0
is no number, and one of them spoils the whole output.
"""

from __future__ import annotations

from torch import fx

from qhyvit.graph.ops import LAYOUT, Target, argument, aten, is_call

_OPERAND: dict[Target, int] = {
    aten.div.Tensor: 1,
    aten.reciprocal.default: 0,
    aten.rsqrt.default: 0,
    aten.log.default: 0,
}
# They keep a small number small, or add no more than an epsilon.
_PASSING: frozenset[Target] = LAYOUT | frozenset(
    {aten.add.Tensor, aten.clamp.default, aten.clamp_min.default, aten.mul.Tensor, aten.sqrt.default}
)


def meets_pole(reader: fx.Node, operand: fx.Node) -> bool:
    """Whether a value reaches nothing but poles through one of its readers."""
    if reader.target in _OPERAND:
        return reader.args[_OPERAND[reader.target]] is operand
    if is_call(reader, frozenset({aten.pow.Tensor_Scalar})):
        return float(argument(reader, "exponent")) < 0
    if not is_call(reader, _PASSING) or any(n is not operand and n.op != "get_attr" for n in reader.all_input_nodes):
        return False
    return bool(reader.users) and all(meets_pole(user, reader) for user in reader.users)
