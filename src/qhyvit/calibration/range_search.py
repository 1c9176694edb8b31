"""Search of scale and zero point on a histogram: the scores of a candidate, and where to look for candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qhyvit.calibration.statistics import TensorStatistics
from qhyvit.quantizers.uniform import affine_parameters, code_range

if TYPE_CHECKING:
    from qhyvit.calibration.ranges import RangeOptions

Score = Callable[[Tensor, Tensor], Tensor]
"""Scales (n,) and zero points (n,), both float64, to scores (n,), lower is better."""

_CELLS_AT_ONCE = 1 << 15  # of a candidate-by-edge table: a quarter megabyte, so that it stays in a core's cache


class HistogramDensity:
    """A histogram without its empty ends and its exact zeros, cut off at the exact extremes.

    Exact zeros are left out because no quantizer here moves them.

    Attributes:
        counts: (bins,) float64, the bins from the lowest value's to the highest value's.
        edges: (bins + 1,) float64, multiples of `width` but for the two at the extremes.
        width: of a whole bin.
        first_edge: of the first bin, before it was cut off.
    """

    def __init__(self, statistics: TensorStatistics) -> None:
        counts, edges = statistics.histogram()
        self.width, self.first_edge = float(edges[1] - edges[0]), float(edges[0])
        if statistics.zeros:
            zero_bin = round(-self.first_edge / self.width)
            counts[zero_bin] = (counts[zero_bin] - statistics.zeros).clamp(min=0)
        low, high = statistics.low.double(), statistics.high.double()
        last = int((edges[:-1] <= high).sum())
        self.counts, self.edges = counts[:last], edges[: last + 1]
        sliver = self.width / 1024  # a bin that holds but its own edge still has a length to divide by
        self.edges[0] = torch.minimum(low, self.edges[1] - sliver)
        self.edges[-1] = torch.maximum(high, self.edges[-2] + sliver)

    def chunk(self, columns: int) -> int:
        """How many candidates to score at once when each needs `columns` numbers."""
        return max(1, _CELLS_AT_ONCE // columns)


def squared_error(density: HistogramDensity, quant_min: int, quant_max: int) -> Score:
    """The score "sum of squared quantization errors", exact for values spread evenly within each bin.

    With m = clip(round(x / s)) and r = x - s·m, the antiderivative of the squared error is m·s³/12 + r³/3, inside the
    clip range and outside. The error of a bin is a difference of two of its values, and the sum over the bins becomes,
    by parts, a sum over the edges.

    Returns:
        A function of scales and zero points.
    """
    per_length = density.counts / density.edges.diff()
    jumps = -torch.diff(per_length, prepend=per_length.new_zeros(1), append=per_length.new_zeros(1))
    edges, jumps = density.edges[jumps != 0], jumps[jumps != 0]  # between empty bins nothing jumps

    def score(scale: Tensor, zero_point: Tensor) -> Tensor:
        s, z = scale[:, None], zero_point[:, None]
        whole = (edges / s).round_()
        torch.maximum(whole, quant_min - z, out=whole)
        torch.minimum(whole, quant_max - z, out=whole)
        rest = torch.addcmul(edges, whole, s, value=-1)
        return (whole @ jumps) * scale.pow(3) / 12 + (rest * rest).mul_(rest) @ jumps / 3

    return _in_chunks(score, density.chunk(max(1, len(edges))))


def divergence(density: HistogramDensity, quant_min: int, quant_max: int) -> Score:
    """The score "Kullback-Leibler divergence of the quantized from the clipped distribution", after TensorRT's.

    Clipped: the values outside the range join the outermost bin inside. Quantized: the values inside are spread, code
    by code, evenly over the non-empty bins of the code. Unlike TensorRT's script, bins belong to codes by the
    quantizer's own rounding instead of in equal groups, the outermost bin is a non-empty one (else the score jumps
    with every gap in the tail), and the quantized distribution is not scaled up for the values it lacks (else a range
    that loses nearly all scores 0); the divergence is Σ p·log(p / q) - p + q accordingly. A scale below the bin width
    scores infinity: the histogram cannot tell there.

    Returns:
        A function of scales and zero points.
    """
    counts, width, first_edge = density.counts, density.width, density.first_edge
    total = counts.sum()
    entropies = torch.xlogy(counts, counts)
    sums = [torch.cat([counts.new_zeros(1), terms.cumsum(0)]) for terms in (counts, (counts > 0).double(), entropies)]
    codes = torch.arange(quant_min, quant_max + 2, dtype=torch.float64)
    filled = counts.nonzero().flatten()

    def score(scale: Tensor, zero_point: Tensor) -> Tensor:
        borders = (codes - 0.5 - zero_point[:, None]) * scale[:, None]
        borders = ((borders - first_edge) / width - 0.5).ceil_().clamp_(0, len(counts)).to(torch.int64)
        mass, bins, entropy = (terms[borders].diff(dim=1) for terms in sums)
        mean = mass / bins.clamp(min=1)
        inside = mass.sum(1)
        result = (entropy - torch.xlogy(mass, mean)).sum(1) + inside - total
        low, high = borders[:, :1].contiguous(), borders[:, -1:].contiguous()
        lowest = filled[torch.searchsorted(filled, low).clamp_(max=len(filled) - 1)]
        highest = filled[(torch.searchsorted(filled, high) - 1).clamp_(min=0)]
        for outermost, outliers in ((lowest, sums[0][low]), (highest, total - sums[0][high])):
            code = (borders <= outermost).sum(1, keepdim=True).sub_(1).clamp_(0, len(codes) - 2)
            whole, clipped, quantized = counts[outermost], counts[outermost] + outliers, mean.gather(1, code)
            change = torch.xlogy(clipped, clipped / quantized) - torch.xlogy(whole, whole / quantized)
            result += change[:, 0]
        return torch.where((scale < width) | (inside == 0), torch.inf, result / total)

    return _in_chunks(score, density.chunk(len(codes)))


def _in_chunks(score: Score, size: int) -> Score:
    def chunked(scale: Tensor, zero_point: Tensor) -> Tensor:
        starts = range(0, len(scale), size)
        return torch.cat([score(scale[i : i + size], zero_point[i : i + size]) for i in starts])

    return chunked


def best_range(score: Score, low: Tensor, high: Tensor, options: RangeOptions, *, widen: bool) -> tuple[Tensor, Tensor]:
    """The range of lowest score; never one that scores worse than the extremes themselves.

    A coarse grid first: both ends are scaled independently, down to a thousandth. Then, five times, the best
    scale and zero point are varied together, each time within a third of the distance before.

    Args:
        score: what to minimise.
        low: () the smallest value; extended to hold 0.
        high: () the largest value; likewise.
        options: the quantizer.
        widen: whether an end may lie (by a fifth or so) beyond the extremes, which at few bits can serve the values
            inside better; else the scale is at most that of the extremes.

    Returns:
        The ends, () each, of the dtype of `low`. The ends of an asymmetric range lie on the quantizer's grid, so that
        `affine_parameters` gives back the scale and the zero point that were scored.
    """
    quant_min, quant_max = code_range(options.bits, options.signed)
    lows, highs = _candidates(min(float(low), 0.0), max(float(high), 0.0), options.scheme == "symmetric", widen)
    scales, zeros = affine_parameters(
        lows, highs, bits=options.bits, scheme=options.scheme, signed=options.signed, narrow=options.narrow
    )
    zeros, widest = zeros.double(), scales.argmax()
    scale, zero, least = scales[widest], zeros[widest], torch.tensor(torch.inf, dtype=torch.float64)
    largest = torch.full_like(scale, torch.inf) if widen else scale
    can_shift = options.scheme == "asymmetric" and bool(low < 0) and bool(high > 0)
    reach, shift = 0.15, (quant_max - quant_min) / 24
    for _ in range(6):
        scores = score(scales, zeros)
        if scores.min() < least:
            winner = scores.argmin()
            scale, zero, least = scales[winner], zeros[winner], scores[winner]
        near = 1 + reach * torch.linspace(-1, 1, 17, dtype=torch.float64)
        shifts = torch.arange(-3, 4) * max(1, round(shift / 3)) if can_shift else torch.zeros(1, dtype=torch.int64)
        grid = torch.cartesian_prod((scale * near).clamp(max=largest), (zero + shifts).clamp(quant_min, quant_max))
        scales, zeros, reach, shift = grid[:, 0].contiguous(), grid[:, 1].contiguous(), reach / 3, shift / 3
    if options.scheme == "symmetric":
        end = scale * ((1 << (options.bits - 1)) - (1.0 if options.narrow else 0.5))
        return (-end).to(low.dtype), end.to(low.dtype)
    return ((quant_min - zero) * scale).to(low.dtype), ((quant_max - zero) * scale).to(low.dtype)


def _candidates(low: float, high: float, symmetric: bool, widen: bool) -> tuple[Tensor, Tensor]:
    """Candidate ends (n,), float64, the extremes among them."""
    if symmetric:
        highs = max(-low, high) * _factors(192, widen)
        return -highs, highs
    if low < 0 < high:
        grid = torch.cartesian_prod(low * _factors(24, widen), high * _factors(24, widen))
        return grid[:, 0], grid[:, 1]
    factors = _factors(192, widen)
    return low * factors, high * factors


def _factors(number: int, widen: bool) -> Tensor:
    """Factors up to 1: half of them linearly spaced from 0, half geometrically from a thousandth; more up to 1.2."""
    half = number // 2
    linear = torch.arange(1, half * 6 // 5 + 1 if widen else half + 1, dtype=torch.float64) / half
    return torch.cat([torch.logspace(-3, 0, half + 1, dtype=torch.float64)[:-1], linear])
