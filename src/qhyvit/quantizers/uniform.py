"""The uniform affine quantizer, the one number format that every integer runtime executes.

A value x is stored as the integer code q = clip(round(x / s) + z, q_min, q_max) and read back as s·(q - z). The
division is a true one and ties round to even, as ONNX QuantizeLinear does: a multiplication with 1/s moves some values
to the neighbouring code.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qhyvit.quantizers.base import Quantizer

Scheme = Literal["symmetric", "asymmetric"]
Zero = Literal["extend", "clamp"]

_SCALE_OF_ZEROS = torch.finfo(torch.float32).eps
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it the scale is subnormal, and flushed to 0 on some machines


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code of a `bits` wide integer.

    Raises:
        ValueError: unless 2 <= bits <= 16.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"a uniform quantizer has 2 to 16 bits, not {bits}")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def overflows(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Where the zero point z = q_min - round(low / s), s = (high - low) / (2^bits - 1), is outside the codes.

    That is where a range lies more than half a step off 0 (Q-HyViT, arXiv 2303.12557, its second challenge).

    Args:
        low: lower ends, any shape.
        high: upper ends, the same shape.
        bits: width of the codes.

    Returns:
        bool, the same shape.
    """
    step = (high.double() - low.double()) / (2**bits - 1)
    found: Tensor = (low.double() > 0.5 * step) | (high.double() < -0.5 * step)
    return found


def affine_parameters(
    low: Tensor, high: Tensor, *, bits: int, scheme: Scheme, signed: bool, zero: Zero = "extend", narrow: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges, elementwise.

    Symmetric: s = max(|low|, |high|) / (2^(bits-1) - 0.5), so that the largest magnitude is off by half a step at most
    on either side although there is one more negative code; with `narrow` the divisor is 2^(bits-1) - 1 and both signs
    have equally many codes. The zero point is 0 (signed) or 2^(bits-1) (unsigned).
    Asymmetric: s = (high - low) / (2^bits - 1), z = q_min - round(low / s).

    Args:
        low: lower ends, any shape, floating point.
        high: upper ends, the same shape, nowhere below `low`.
        bits: width of the codes, 2 to 16.
        scheme: "symmetric" or "asymmetric".
        signed: whether the codes are signed.
        zero: what an asymmetric range without 0 becomes. "extend": widened to hold 0, so z is a code and 0 is exact.
            "clamp": z is computed without 0 and then clamped to the codes, the overflow that Q-HyViT describes: all
            values above high - low (or below low - high) saturate.
        narrow: see above.

    Returns:
        The scale (float64 if an end is float64, else float32; float32 epsilon where the range is empty) and the zero
        point (int32).

    Raises:
        ValueError: if an end is not finite, or `low` is above `high`.
    """
    dtype = torch.float64 if torch.float64 in (low.dtype, high.dtype) else torch.float32
    low, high = low.double(), high.double()
    if not bool(((low <= high) & low.isfinite() & high.isfinite()).all()):
        raise ValueError("a range needs finite ends with low <= high")
    quant_min, quant_max = code_range(bits, signed)
    if scheme == "symmetric":
        half = (1 << (bits - 1)) - (1.0 if narrow else 0.5)
        scale = _usable(torch.maximum(low.abs(), high.abs()) / half, dtype)
        return scale, torch.full_like(scale, 0 if signed else 1 << (bits - 1), dtype=torch.int32)
    if zero == "extend":
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _usable((high - low) / (quant_max - quant_min), dtype)
    zero_point = quant_min - torch.round(low / scale.double())
    return scale, zero_point.clamp(quant_min, quant_max).to(torch.int32)


def _usable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    scale = scale.to(dtype)
    return torch.where(scale < _SMALLEST_SCALE, _SCALE_OF_ZEROS, scale)


class UniformAffine(Quantizer):
    """Uniform affine quantizer with one scale per tensor or per channel.

    Every method casts its input to the scale's dtype first, so that the results are those of a float32 runtime.

    Args:
        scale: (), or (C,) for per-channel; positive, floating point.
        zero_point: the same shape, integers inside the codes.
        bits: width of the codes, 2 to 16.
        signed: codes -2^(bits-1)..2^(bits-1)-1 if true, else 0..2^bits-1.
        axis: the channel axis of the tensors to come; None for per-tensor. May be negative.
        scheme: how scale and zero point were chosen; kept for targets that only execute one scheme.

    Raises:
        ValueError: if shapes, bits, scale or zero point do not fit each other.
    """

    kind: ClassVar[str] = "uniform"
    fields: ClassVar[tuple[str, ...]] = ("bits", "signed", "axis", "scheme")
    executable: ClassVar[bool] = True

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, scale: Tensor, zero_point: Tensor, *, bits: int, signed: bool, axis: int | None = None, scheme: Scheme
    ) -> None:
        super().__init__()
        self.bits, self.signed, self.axis, self.scheme = bits, signed, axis, scheme
        self.quant_min, self.quant_max = code_range(bits, signed)
        if scheme not in ("symmetric", "asymmetric"):
            raise ValueError(f"scheme is {scheme!r}, allowed: symmetric, asymmetric")
        if scale.shape != zero_point.shape or scale.ndim != (axis is not None):
            raise ValueError(
                f"scale {tuple(scale.shape)} and zero point {tuple(zero_point.shape)} must both be "
                f"{'()' if axis is None else '(C,)'} for axis {axis}"
            )
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError("a scale is not positive and finite")
        if not bool(((zero_point >= self.quant_min) & (zero_point <= self.quant_max)).all()):
            raise ValueError(f"a zero point lies outside the codes {self.quant_min}..{self.quant_max}")
        self.register_buffer("scale", scale if scale.dtype == torch.float64 else scale.float())
        self.register_buffer("zero_point", zero_point.to(torch.int32))

    def quantize(self, x: Tensor) -> Tensor:
        """Codes of `x` (any shape, floating point): int32, the same shape. No gradient."""
        codes = _unclamped(x.detach().to(self.scale.dtype), *self._along(x))
        return codes.clamp_(self.quant_min, self.quant_max).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of integer `codes` (any shape, any integer dtype): the scale's dtype, the same shape."""
        scale, zero_point = self._along(codes)
        return codes.to(scale.dtype, copy=True).sub_(zero_point).mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization: `dequantize(quantize(x))` bit for bit, in the scale's dtype.

        The gradient with respect to `x` is straight-through: 1 where the rounded code is one of the quantizer's, 0
        where it was clipped.
        """
        x = x.to(self.scale.dtype)
        scale, zero_point = self._along(x)
        if torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _StraightThrough.apply(x, scale, zero_point, self.quant_min, self.quant_max)  # type: ignore[no-untyped-call]
            return out
        return fake_quantize(x, scale, zero_point, self.quant_min, self.quant_max)

    def extra_repr(self) -> str:
        kind = f"{'int' if self.signed else 'uint'}{self.bits}, {self.scheme}"
        return kind + (", per-tensor" if self.axis is None else f", per-channel (axis {self.axis})")

    def _along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both of the scale's dtype, shaped to broadcast with `x`."""
        scale = self._channels_along(self.scale, x)
        return scale, self._channels_along(self.zero_point, x).to(scale.dtype)

    def _channels_along(self, values: Tensor, x: Tensor) -> Tensor:
        if self.axis is None:
            return values
        if x.shape[self.axis] != len(values):
            raise ValueError(f"{len(values)} scales for axis {self.axis} of a tensor {tuple(x.shape)}")
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return values.view(shape)


def _unclamped(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """A fresh tensor with the codes before clipping, as floats. Adding z also turns the -0.0 of rounding into 0.0."""
    return (x / scale).round_().add_(zero_point)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Fake quantization without a gradient, for searches that hold candidates as plain tensors.

    Args:
        x: the values.
        scale: of the dtype of `x`, broadcasting with it.
        zero_point: likewise, integers held in a floating dtype.
        quant_min: the smallest code.
        quant_max: the largest code.

    Returns:
        A fresh tensor of the broadcast shape.
    """
    codes = _unclamped(x.detach(), scale, zero_point)
    return codes.clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        codes = _unclamped(x, scale, zero_point)
        ctx.save_for_backward((codes >= quant_min) & (codes <= quant_max))
        return codes.clamp_(quant_min, quant_max).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None


def uniform_from_range(
    low: Tensor,
    high: Tensor,
    *,
    bits: int,
    scheme: Scheme,
    signed: bool,
    axis: int | None = None,
    zero: Zero = "extend",
    narrow: bool = False,
) -> UniformAffine:
    """The uniform quantizer of a range; the arguments are those of `affine_parameters`.

    Args:
        low: lower end, () or (C,) with `axis`.
        high: upper end, the same shape.
        bits: width of the codes, 2 to 16.
        scheme: "symmetric" or "asymmetric".
        signed: whether the codes are signed.
        axis: the channel axis of per-channel ranges.
        zero: "extend" or "clamp" a range without 0.
        narrow: symmetric ranges use as many negative as positive codes.

    Raises:
        ValueError: as `affine_parameters` and `UniformAffine`.
    """
    scale, zero_point = affine_parameters(low, high, bits=bits, scheme=scheme, signed=signed, zero=zero, narrow=narrow)
    return UniformAffine(scale, zero_point, bits=bits, signed=signed, axis=axis, scheme=scheme)
