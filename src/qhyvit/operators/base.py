"""What integer forms of operators have in common."""

from __future__ import annotations

from torch import Tensor

from qhyvit.stored import Stored


class IntegerOperator(Stored):
    """An operator computed on the codes of its one operand: fake-quantized values in, values of codes out.

    Integers are held in float64, where they are exact up to 2^53; divisions and logarithms are those that the method
    states. It has no gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Values of the output's codes, in the dtype of `x`."""
        raise NotImplementedError
