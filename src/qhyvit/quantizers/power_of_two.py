"""Power-of-two factor: one scale and zero point per tensor, shifted by a whole number of bits per channel.

FQ-ViT (arXiv 2111.13824), for the inputs of norms: an integer norm shifts the codes of channel c by k_c and goes on
with one scale. A convolution or linear cannot, as its sum runs over channels with different shifts.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from qhyvit.quantizers.uniform import UniformAffine, affine_parameters, code_range, fake_quantize


class PowerOfTwoFactor(UniformAffine):
    """Unsigned uniform quantizer with scale s_0·2^(k_c) for channel c and one zero point.

    Args:
        scale: (C,) s_0·2^(k_c).
        zero_point: (C,) all the same.
        exponents: (C,) k_c, integers from 0 on.
        bits: width of the codes, 2 to 16.
        axis: the channel axis.

    Raises:
        ValueError: if the tensors do not fit each other.
    """

    kind: ClassVar[str] = "power-of-two"
    fields: ClassVar[tuple[str, ...]] = ("bits", "axis")
    executable: ClassVar[bool] = False

    exponents: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, exponents: Tensor, *, bits: int, axis: int) -> None:
        super().__init__(scale, zero_point, bits=bits, signed=False, axis=axis, scheme="asymmetric")
        base = torch.ldexp(self.scale, -exponents)
        if exponents.shape != scale.shape or not bool((base == base[0]).all() & (zero_point == zero_point[0]).all()):
            raise ValueError("scales must be one scale times powers of two, with one zero point")
        self.register_buffer("exponents", exponents.to(torch.int32))

    @property
    def base_scale(self) -> Tensor:
        """() s_0, the scale of the shifted codes."""
        return torch.ldexp(self.scale[0], -self.exponents[0])

    @classmethod
    def fitted(cls, samples: Tensor, low: Tensor, high: Tensor, *, bits: int, axis: int, largest: int = 3) -> Self:
        """The quantizer of a tensor's range with the exponents of least squared error.

        s = (high - low) / (2^bits - 1) is the scale for k = `largest`, s_0 = s / 2^largest; z belongs to s.

        Args:
            samples: (n, C), the last axis the channels.
            low: () lower end of the whole tensor's range.
            high: () upper end.
            bits: width of the codes.
            axis: the channel axis of the tensors to come.
            largest: the largest exponent, K.
        """
        scale, zero = affine_parameters(low, high, bits=bits, scheme="asymmetric", signed=False)
        errors = []
        for k in range(largest + 1):
            step = torch.ldexp(scale, torch.tensor(k - largest))
            coded = fake_quantize(samples.to(scale.dtype), step, zero.to(scale.dtype), *code_range(bits, False))
            errors.append((coded - samples).square().sum(0))
        exponents = torch.stack(errors).argmin(0)
        scales = torch.ldexp(scale.expand(len(exponents)), exponents - largest)
        return cls(scales, zero.expand(len(scales)).clone(), exponents, bits=bits, axis=axis)
