"""How wide a quantizer's range is: min-max, percentile, least squared error, least divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qhyvit.calibration.range_search import HistogramDensity, best_range, divergence, squared_error
from qhyvit.calibration.statistics import TensorStatistics
from qhyvit.quantizers.uniform import Scheme, affine_parameters, code_range, fake_quantize
from qhyvit.registry import Registry


@dataclass(frozen=True)
class RangeOptions:
    """For which quantizer a range is sought, and the settings' own options.

    Attributes:
        bits: width of the codes, 2 to 16.
        scheme: "symmetric" or "asymmetric".
        percentile: for "percentile", how much of the values stays inside each clipped end, in percent.
        signed: whether the codes are signed.
        narrow: whether a symmetric quantizer uses as many negative as positive codes.
    """

    bits: int
    scheme: Scheme
    percentile: float = 99.99
    signed: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"the percentile is {self.percentile}, it must be above 50 and at most 100")


RangeSetting = Callable[[TensorStatistics, RangeOptions], tuple[Tensor, Tensor]]
"""Statistics and options to the low and high end, () each, of the dtype of the statistics' extremes."""

RANGES: Registry[RangeSetting] = Registry("range setting")


@RANGES.register("minmax")
def minmax(statistics: TensorStatistics, options: RangeOptions) -> tuple[Tensor, Tensor]:
    """The exact extremes."""
    return statistics.low, statistics.high


@RANGES.register("percentile")
def percentile(statistics: TensorStatistics, options: RangeOptions) -> tuple[Tensor, Tensor]:
    """Percentiles of the histogram, interpolated within a bin.

    Symmetric: ± the percentile of |x|. Asymmetric: the percentile at the upper end, 100 minus it at the lower; a range
    that holds 0 keeps it.
    """
    counts, edges = statistics.histogram()
    low, high, share = statistics.low, statistics.high, options.percentile / 100
    if options.scheme == "symmetric":
        end = low.new_tensor(_quantile(*_magnitudes(counts, edges), share)).minimum(torch.maximum(-low, high))
        return -end, end
    bottom = low.new_tensor(_quantile(counts, edges, 1 - share)).maximum(low)
    top = low.new_tensor(_quantile(counts, edges, share)).minimum(high)
    return _keep_zero(bottom, top, low, high)


@RANGES.register("mse")
def mse(statistics: TensorStatistics, options: RangeOptions) -> tuple[Tensor, Tensor]:
    """The range of least squared quantization error on the histogram (OMSE, arXiv 1902.06822).

    Both ends are searched. The range holds 0, as the quantizer would extend it anyway, and may reach a little beyond
    the extremes. Its error on the histogram is never above that of the extremes.
    """
    density = HistogramDensity(statistics)
    score = squared_error(density, *code_range(options.bits, options.signed))
    return best_range(score, statistics.low, statistics.high, options, widen=True)


@RANGES.register("kl")
def kl(statistics: TensorStatistics, options: RangeOptions) -> tuple[Tensor, Tensor]:
    """The range of least Kullback-Leibler divergence on the histogram (TensorRT's entropy calibration).

    The divergence compares shares of values and not distances, so rare large values weigh little: after softmax, or
    with heavy tails at 8 bits, the squared error is often several times that of the extremes. With more codes than
    histogram bins there is no divergence to see, and the extremes are returned.
    """
    density = HistogramDensity(statistics)
    if 1 << options.bits > len(density.counts) or not bool(density.counts.any()):
        return minmax(statistics, options)
    score = divergence(density, *code_range(options.bits, options.signed))
    return best_range(score, statistics.low, statistics.high, options, widen=False)


def weight_range(weight: Tensor, setting: str, options: RangeOptions, axis: int | None) -> tuple[Tensor, Tensor]:
    """Range of a tensor at hand, one for all of it or one per channel.

    "minmax" and "percentile" are exact. "mse" tries 100 factors, 0.01 to 1, on the extremes of each channel
    (asymmetric: on both ends together, then on the upper and on the lower one alone) and measures the error on the
    values themselves. The other settings need more values than a channel has and are replaced by "mse".

    Args:
        weight: any shape, floating point, not empty.
        setting: a name in `RANGES`.
        options: the quantizer.
        axis: the channel axis; None: one range.

    Returns:
        The low and high ends, () or (C,), float64 for float64 weights, else float32.

    Raises:
        QhyvitError: if no range setting is called so.
        ValueError: if a weight is not finite.
    """
    RANGES[setting]  # explains a typo
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
    low, high = torch.aminmax(rows, dim=1)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError(f"a weight {tuple(weight.shape)} is not finite")
    if setting == "percentile":
        low, high = row_percentiles(rows, low, high, options)
    elif setting != "minmax":
        low, high = _row_least_error(rows, low, high, options)
    return (low[0], high[0]) if axis is None else (low, high)


def row_percentiles(rows: Tensor, low: Tensor, high: Tensor, options: RangeOptions) -> tuple[Tensor, Tensor]:
    """Ends (C,) of the percentile range of each row (C, K), exact; `low` and `high` (C,) are the rows' extremes."""
    share = options.percentile / 100
    if options.scheme == "symmetric":
        end = _sorted_quantile(rows.abs().sort(dim=1).values, share)
        return -end, end
    ascending = rows.sort(dim=1).values
    return _keep_zero(_sorted_quantile(ascending, 1 - share), _sorted_quantile(ascending, share), low, high)


def _row_least_error(rows: Tensor, low: Tensor, high: Tensor, options: RangeOptions) -> tuple[Tensor, Tensor]:
    factors = torch.linspace(0.01, 1, 100, dtype=rows.dtype, device=rows.device)[:, None]
    fixed = torch.ones_like(factors)
    sweeps = [(factors, factors)]
    if options.scheme == "asymmetric":
        low, high = low.clamp(max=0), high.clamp(min=0)
        sweeps += [(fixed, factors), (factors, fixed)]
    for low_factors, high_factors in sweeps:
        lows, highs = low * low_factors, high * high_factors
        choice = _row_errors(rows, lows, highs, options).argmin(dim=0, keepdim=True)
        low, high = lows.gather(0, choice)[0], highs.gather(0, choice)[0]
    return low, high


def _row_errors(rows: Tensor, lows: Tensor, highs: Tensor, options: RangeOptions) -> Tensor:
    """Squared error (n, C) of rows (C, K) quantized with each of the ranges (n, C)."""
    scales, zeros = affine_parameters(
        lows, highs, bits=options.bits, scheme=options.scheme, signed=options.signed, narrow=options.narrow
    )
    codes = code_range(options.bits, options.signed)
    errors = torch.empty_like(lows)
    for scale, zero, error in zip(scales[..., None], zeros[..., None].to(rows.dtype), errors, strict=True):
        torch.sum(fake_quantize(rows, scale, zero, *codes).sub_(rows).square_(), dim=1, out=error)
    return errors


def _keep_zero(bottom: Tensor, top: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The ends bottom and top, moved to 0 where the extremes low and high lie on its other side."""
    bottom = torch.where(low <= 0, bottom.clamp(max=0), bottom)
    return bottom, torch.where(high >= 0, top.clamp(min=0), top)


def _sorted_quantile(ascending: Tensor, share: float) -> Tensor:
    """Quantile of each row (C, K), linear between neighbours. torch.quantile refuses large tensors."""
    place = share * (ascending.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ascending.shape[1] - 1)
    return torch.lerp(ascending[:, below], ascending[:, above], place - below)


def _quantile(counts: Tensor, edges: Tensor, share: float) -> float:
    """Below which value the `share` of a histogram lies, if each bin is filled evenly."""
    reached = counts.cumsum(0)
    target = share * reached[-1]
    place = min(int(torch.searchsorted(reached, target)), len(counts) - 1)
    inside = (target - reached[place] + counts[place]) / counts[place].clamp(min=torch.finfo(counts.dtype).tiny)
    return float(torch.lerp(edges[place], edges[place + 1], inside.clamp(0, 1)))


def _magnitudes(counts: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The histogram of |x|, exact as zero is an edge."""
    width = edges[1] - edges[0]
    places = torch.arange(len(counts)) + round(float(edges[0] / width))
    places = torch.where(places < 0, -1 - places, places)
    first = int(places.min())
    folded = counts.new_zeros(int(places.max()) - first + 1).index_add_(0, places - first, counts)
    return folded, (torch.arange(len(folded) + 1, dtype=torch.float64) + first) * width
