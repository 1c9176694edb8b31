"""What calibration keeps of a tensor: extremes and a histogram, in memory that no number of pictures enlarges."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor


class TensorStatistics:
    """Extremes and a histogram of all values seen, streamed batch by batch. Everything is kept on the CPU.

    Bin edges are whole multiples of the bin width, hence zero is always an edge (or would be one, where the data keep
    away from zero). The width is the smallest power of two with which the bins cover all values seen; when the range
    grows, it doubles and neighbours are merged, which is exact. Width and position therefore follow from the extremes
    alone: the order and the size of the batches do not matter. Between half of the bins and all of them are in use.

    Large batches enter the histogram as a sample: every stride-th value, the stride having no common factor with the
    tensor's size, so that each channel, row and column is met equally often. Sampled values count for those they stand
    for. The two extremes of each batch always enter.

    Args:
        channel_axis: the axis for which extremes are kept per channel; None: only those of the whole tensor.
        bins: number of histogram bins, at least 2.
        samples_per_batch: the most values of one batch that enter the histogram, at least 1.

    Attributes:
        count: number of values seen.
        zeros: how much of the histogram is exactly 0 (all of it lies in the bin that begins at 0). Quantization leaves
            these values as they are.
        channel_low: (C,) smallest value of each channel; None without `channel_axis` or before the first update.
        channel_high: (C,) likewise the largest.
    """

    def __init__(self, channel_axis: int | None = None, bins: int = 2048, samples_per_batch: int = 65536) -> None:
        if bins < 2 or samples_per_batch < 1:
            raise ValueError(f"bins is {bins} and samples_per_batch {samples_per_batch}, at least 2 and 1 are needed")
        self.channel_axis, self.bins, self.samples_per_batch = channel_axis, bins, samples_per_batch
        self.count = 0
        self.zeros = 0.0
        self.channel_low: Tensor | None = None
        self.channel_high: Tensor | None = None
        self._low, self._high = math.inf, -math.inf
        self._dtype = torch.float32
        self._counts = torch.zeros(bins, dtype=torch.float64)
        self._exponent = 0  # the width of a bin is 2 to this power
        self._start = 0  # the first bin begins at this multiple of the width

    @property
    def low(self) -> Tensor:
        """() smallest value seen; float64 if a float64 tensor was seen, else float32. ValueError before any."""
        self._require_values()
        return torch.tensor(self._low, dtype=self._dtype)

    @property
    def high(self) -> Tensor:
        """() largest value seen, as `low`."""
        self._require_values()
        return torch.tensor(self._high, dtype=self._dtype)

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Counts (bins,) and edges (bins + 1,), both float64. Bin i holds edges[i] <= x < edges[i + 1].

        Raises:
            ValueError: if no value was seen yet.
        """
        self._require_values()
        places = torch.arange(self._start, self._start + self.bins + 1, dtype=torch.float64)
        return self._counts.clone(), places * math.ldexp(1.0, self._exponent)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in one batch.

        Args:
            x: any shape (with `channel_axis` as many channels each time), any real dtype, any device; may be empty.

        Raises:
            ValueError: if a value is not finite, or the number of channels changed. Nothing was taken in then.
        """
        if x.numel() == 0:
            return
        x = x.detach() if x.is_floating_point() else x.float()
        dtype = torch.promote_types(self._dtype, x.dtype)
        values = _in_memory_order(x)
        ends = torch.aminmax(values) if self.channel_axis is None else _channel_extremes(x, self.channel_axis)
        lows, highs = (end.to("cpu", dtype) for end in ends)
        low, high = float(lows.min()), float(highs.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"a tensor {tuple(x.shape)} is not finite: its extremes are {low} and {high}")
        self._keep_channels(lows, highs)
        self._dtype = dtype
        self._widen(low, high)
        self._fill(values, low, high)
        self.count += x.numel()

    def _keep_channels(self, lows: Tensor, highs: Tensor) -> None:
        if self.channel_axis is None:
            return
        if self.channel_low is None or self.channel_high is None:
            self.channel_low, self.channel_high = lows, highs
            return
        if lows.shape != self.channel_low.shape:
            raise ValueError(f"a tensor with {len(lows)} channels after tensors with {len(self.channel_low)}")
        self.channel_low = torch.minimum(self.channel_low, lows)
        self.channel_high = torch.maximum(self.channel_high, highs)

    def _widen(self, low: float, high: float) -> None:
        """Make the bins cover `low` and `high` as well."""
        self._low, self._high = min(self._low, low), max(self._high, high)
        exponent = _width_exponent(self._low, self._high, self.bins)
        start = math.floor(math.ldexp(self._low, -exponent))
        if self.count and (exponent, start) != (self._exponent, self._start):
            self._counts = self._rebinned(exponent, start)
        self._exponent, self._start = exponent, start

    def _rebinned(self, exponent: int, start: int) -> Tensor:
        """The counts in bins as wide or wider, which cover all values seen."""
        places = torch.arange(self._start, self._start + self.bins)
        places = (places >> min(exponent - self._exponent, 62)) - start
        places.clamp_(0, self.bins - 1)  # only bins that are still empty fall outside
        return torch.zeros_like(self._counts).index_add_(0, places, self._counts)

    def _fill(self, values: Tensor, low: float, high: float) -> None:
        stride = _even_stride(len(values), self.samples_per_batch)
        sample = values[::stride].to("cpu")
        sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
        places = (sample * math.ldexp(1.0, -self._exponent)).floor_().sub_(self._start)
        weight = 1.0
        if stride > 1:
            weight = max(len(values) - 2, 0) / len(sample)
            for end in (low, high):
                self._counts[math.floor(math.ldexp(end, -self._exponent)) - self._start] += 1.0
                self.zeros += end == 0.0
        self._counts += torch.bincount(places.to(torch.int64), minlength=self.bins).double().mul_(weight)
        self.zeros += weight * int((sample == 0).sum())

    def merged(self, other: TensorStatistics) -> TensorStatistics:
        """Of what both have seen: the same as one that had seen it all. Neither is changed.

        Args:
            other: of the same tensor on other pictures, made with the same arguments.

        Raises:
            ValueError: if the number of channels or of bins is not the same.
        """
        if self.bins != other.bins:
            raise ValueError(f"histograms of {self.bins} and of {other.bins} bins")
        if other.count == 0:
            return copy.deepcopy(self)
        if self.count == 0:
            return copy.deepcopy(other)
        new = copy.deepcopy(self)
        if other.channel_low is not None and other.channel_high is not None:
            new._keep_channels(other.channel_low, other.channel_high)
        new._dtype = torch.promote_types(self._dtype, other._dtype)
        new._widen(other._low, other._high)
        new._counts += other._rebinned(new._exponent, new._start)
        new.zeros += other.zeros
        new.count += other.count
        return new

    def _require_values(self) -> None:
        if self.count == 0:
            raise ValueError("no values were recorded yet")


def _channel_extremes(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    others = [i for i in range(x.ndim) if i != axis % x.ndim]
    return (x.amin(others), x.amax(others)) if others else (x.clone(), x.clone())


def _width_exponent(low: float, high: float, bins: int) -> int:
    """Smallest e such that bins of width 2^e, aligned to 0, cover low..high.

    Not below 2^-24 of the largest magnitude, the resolution of float32, nor below 2^-126, its smallest normal number.
    """
    exponent = max(math.frexp(max(abs(low), abs(high)))[1] - 24, -126)
    if high > low:
        exponent = max(exponent, math.frexp((high - low) / bins)[1] - 1)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= bins:
        exponent += 1
    return exponent


def _even_stride(size: int, samples: int) -> int:
    """Smallest stride that leaves at most `samples` of `size` values and shares no factor with `size`."""
    stride = -(-size // samples)
    while stride > 1 and math.gcd(stride, size) > 1:
        stride += 1
    return stride


def _in_memory_order(x: Tensor) -> Tensor:
    """The values of `x` as (n,), without a copy wherever `x` is a permuted dense tensor (channels last, transposed)."""
    return x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)
