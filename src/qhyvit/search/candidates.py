"""Many uniform quantizers at once, as plain tensors: what a search evaluates before it builds the one it chose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qhyvit.quantizers.uniform import Scheme, UniformAffine, Zero, affine_parameters, code_range, fake_quantize


@dataclass(frozen=True)
class Candidates:
    """B quantizers of one width and scheme.

    Attributes:
        scale, zero_point: (B, C), float; C = 1 for per-tensor ones.
        bits, signed, scheme: as in `UniformAffine`.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    signed: bool
    scheme: Scheme

    def __len__(self) -> int:
        return len(self.scale)

    def __call__(self, x: Tensor, channels: Tensor | None = None) -> Tensor:
        """Fake quantization by each: x (…) → (B, …).

        Args:
            x: the values.
            channels: the channel of each value, broadcasting with `x`, int64; None for per-tensor candidates.
        """
        scale, zero_point = self._along(x, channels)
        return fake_quantize(x[None], scale, zero_point, *code_range(self.bits, self.signed))

    def each(self, x: Tensor, channels: Tensor | None = None) -> Iterator[tuple[Tensor, float]]:
        """One candidate after the other: its values of x, up to a factor that is left to whatever is made of them.

        Args:
            x: the values.
            channels: as above.

        Yields:
            Values in the shape of x, in a buffer that the next ones overwrite, and the factor: its scale, or 1 where
            each channel has a scale.
        """
        least, most = code_range(self.bits, self.signed)
        buffer = torch.empty_like(x)
        if self.scale.shape[1] == 1:  # numbers: several times faster than tensors of one element
            for scale, zero in zip(self.scale.flatten().tolist(), self.zero_point.flatten().tolist(), strict=True):
                yield torch.div(x, scale, out=buffer).round_().clamp_(least - zero, most - zero), scale
            return
        for scales, zeros in zip(*self._along(x, channels), strict=True):
            yield torch.div(x, scales, out=buffer).round_().clamp_(least - zeros, most - zeros).mul_(scales), 1.0

    def _along(self, x: Tensor, channels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scales and zero points that broadcast with (B, *x.shape)."""
        if self.scale.shape[1] == 1 or channels is None:
            spread = (-1, *[1] * x.ndim)
            return self.scale.view(spread).to(x), self.zero_point.view(spread).to(x)
        return self.scale[:, channels].to(x), self.zero_point[:, channels].to(x)

    def split(self, size: int) -> list[Candidates]:
        """In pieces of at most `size` candidates."""
        pieces = zip(torch.split(self.scale, size), torch.split(self.zero_point, size), strict=True)
        return [Candidates(s, z, self.bits, self.signed, self.scheme) for s, z in pieces]

    def build(self, axis: int | None) -> UniformAffine:
        """The quantizer of a batch of one; `axis` is where its channels lie, if it has a scale for each."""
        whole = self.scale.shape[1] == 1
        scale, zero_point = (t[0, 0] if whole else t[0] for t in (self.scale, self.zero_point))
        kind = {"bits": self.bits, "signed": self.signed, "scheme": self.scheme}
        return UniformAffine(scale, zero_point, axis=None if whole else axis, **kind)  # type: ignore[arg-type]

    @classmethod
    def from_ranges(
        cls, low: Tensor, high: Tensor, *, bits: int, signed: bool, scheme: Scheme, zero: Zero = "extend"
    ) -> Candidates:
        """The candidates of ranges (B, C)."""
        scale, zero_point = affine_parameters(low, high, bits=bits, scheme=scheme, signed=signed, zero=zero)
        return cls(scale, zero_point.to(scale.dtype), bits, signed, scheme)

    @classmethod
    def of(cls, quantizer: UniformAffine) -> Candidates:
        """One quantizer as a batch of one."""
        scale, zero_point = quantizer.scale.view(1, -1), quantizer.zero_point.view(1, -1)
        return cls(scale, zero_point.to(scale.dtype), quantizer.bits, quantizer.signed, quantizer.scheme)
