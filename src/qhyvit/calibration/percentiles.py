"""Search over percentiles: the clipped range of least squared error (RepQ-ViT, I&S-ViT, ERQ and others)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qhyvit.calibration.range_search import HistogramDensity, squared_error
from qhyvit.calibration.ranges import RANGES, RangeOptions, row_percentiles
from qhyvit.calibration.statistics import TensorStatistics
from qhyvit.quantizers.uniform import affine_parameters, code_range, fake_quantize

PERCENTILES = (99.9, 99.99, 99.999)


def percentile_search(
    statistics: TensorStatistics, options: RangeOptions, percentiles: Sequence[float] = PERCENTILES
) -> tuple[Tensor, Tensor]:
    """Ends () of the range whose percentile gives the least squared error on the histogram."""
    ends = [RANGES["percentile"](statistics, replace(options, percentile=p)) for p in percentiles]
    lows, highs = (torch.stack(end).double() for end in zip(*ends, strict=True))
    scale, zero = affine_parameters(lows, highs, bits=options.bits, scheme=options.scheme, signed=options.signed)
    density = HistogramDensity(statistics)
    best = int(squared_error(density, *code_range(options.bits, options.signed))(scale, zero.double()).argmin())
    return ends[best]


def row_percentile_search(
    rows: Tensor, options: RangeOptions, percentiles: Sequence[float] = PERCENTILES
) -> tuple[Tensor, Tensor]:
    """Ends (C,) for each row of (C, K), each with the percentile of its own least squared error."""
    rows = rows.detach().float()
    low, high = torch.aminmax(rows, dim=1)
    best = torch.full_like(low, torch.inf)
    bottom, top = low.clone(), high.clone()
    for p in percentiles:
        lows, highs = row_percentiles(rows, low, high, replace(options, percentile=p))
        scale, zero = affine_parameters(lows, highs, bits=options.bits, scheme=options.scheme, signed=options.signed)
        coded = fake_quantize(rows, scale[:, None], zero[:, None].to(rows), *code_range(options.bits, options.signed))
        error = coded.sub_(rows).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        bottom, top = torch.where(better, lows, bottom), torch.where(better, highs, top)
    return bottom, top
