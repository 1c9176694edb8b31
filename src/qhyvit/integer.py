"""Products of integer codes, computed as integer runtimes compute them.

Fake quantization multiplies dequantized floats; a runtime sums products of codes in int32 and scales the sum once. Both
are the same number but for float rounding, and that moves one value in 10⁵ to the neighbouring code, which a deep
net amplifies. Here the codes themselves are multiplied: in float32, where sums of integers are exact up to 2²⁴.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qhyvit.quantizers.uniform import UniformAffine


class IntegerProduct(nn.Module):
    """A convolution, linear or matmul on codes, its output scaled and, if asked for, requantized.

    Args:
        operator: the ATen operator, called as operator(left, right, *rest).
        rest: its further arguments after the operands (for a layer the first is the bias, as codes, or None).
        left: quantizer of the first operand, per-tensor.
        right: quantizer of the second operand where it is an activation; None where it is a constant weight.
        weight: integer codes of a constant weight, zero point taken off, float32.
        scale: of the accumulator: () or (C,), as the runtime computes it.
        axis: channel axis of the output, for a scale per channel.
        output: quantizer of the output, applied with one multiplication as runtimes do; None: a float output.
    """

    _bias: Tensor | None
    _left: Tensor
    _right: Tensor | None
    _weight: Tensor | None
    _factor: Tensor

    def __init__(
        self,
        operator: Callable[..., Tensor],
        rest: tuple[Any, ...],
        left: UniformAffine,
        right: UniformAffine | None,
        weight: Tensor | None,
        scale: Tensor,
        axis: int,
        output: UniformAffine | None,
    ) -> None:
        super().__init__()
        self._operator, self._axis, self._output = operator, axis, copy.deepcopy(output)
        self.operands = 1 if right is None else 2
        self._rest = rest[1:]
        self.register_buffer("_bias", rest[0] if rest else None)
        self.register_buffer("_left", left.scale)
        self.register_buffer("_right", None if right is None else right.scale)
        self.register_buffer("_weight", weight)
        factor = scale if output is None else scale / output.scale
        self.register_buffer("_factor", factor)

    @property
    def requantizes(self) -> bool:
        """Whether the output is quantized here."""
        return self._output is not None

    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        """Fake-quantized operands in, float (or fake-quantized) output out."""
        a = torch.round(left / self._left)
        if right is not None:
            total = self._operator(a, torch.round(right / self._right))  # type: ignore[operator]
        else:
            total = self._operator(a, self._weight, self._bias, *self._rest)
        factor = self._factor
        if factor.ndim:
            factor = factor.view([-1 if i == self._axis else 1 for i in range(total.ndim)])
        total = total * factor
        if self._output is None:
            return total
        quantizer = self._output
        zero = quantizer.zero_point.to(total.dtype)
        codes = total.round_().add_(zero).clamp_(quantizer.quant_min, quantizer.quant_max)
        return codes.sub_(zero).mul_(quantizer.scale)
