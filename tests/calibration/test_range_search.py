from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qhyvit.calibration import RangeOptions, TensorStatistics
from qhyvit.calibration.range_search import HistogramDensity, best_range, divergence, squared_error
from qhyvit.quantizers.uniform import affine_parameters, fake_quantize


def _density(x: Tensor, bins: int) -> tuple[HistogramDensity, TensorStatistics]:
    statistics = TensorStatistics(bins=bins, samples_per_batch=1 << 20)
    statistics.update(x)
    return HistogramDensity(statistics), statistics


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.floats(0.02, 0.5), st.integers(0, 15))
def test_squared_error_is_the_error_of_values_spread_over_the_bins(seed: int, scale: float, zero: int) -> None:
    """Fill each bin with many evenly spaced values, quantize those, and compare the sums."""
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    density, _ = _density(x, 32)
    steps = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    values = density.edges[:-1, None] + density.edges.diff()[:, None] * steps
    s, z = torch.tensor([scale], dtype=torch.float64), torch.tensor([float(zero)], dtype=torch.float64)
    each = (fake_quantize(values, s, z, 0, 15) - values).square().mean(1)
    expected = float((each * density.counts).sum())
    assert float(squared_error(density, 0, 15)(s, z)) == pytest.approx(expected, rel=1e-3)


def test_exact_zeros_cost_nothing() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).relu() + 0.0
    padded = torch.cat([x, torch.zeros(10_000)])
    s, z = torch.tensor([0.3], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    first, second = (squared_error(_density(values, 64)[0], 0, 15)(s, z) for values in (x, padded))
    assert first == pytest.approx(second)


def _divergence_by_loops(density: HistogramDensity, scale: float, zero: int, quant_max: int) -> float:
    """TensorRT's procedure for one candidate, with the corrections that `divergence` names."""
    counts = density.counts.tolist()
    centres = [density.first_edge + (i + 0.5) * density.width for i in range(len(counts))]
    codes = [round(centre / scale) + zero for centre in centres]
    inside = [i for i, code in enumerate(codes) if 0 <= code <= quant_max]
    filled = [i for i in inside if counts[i] > 0]
    p = {i: counts[i] for i in inside}
    p[filled[0]] += sum(count for count, code in zip(counts, codes, strict=True) if code < 0)
    p[filled[-1]] += sum(count for count, code in zip(counts, codes, strict=True) if code > quant_max)
    q = {}
    for code in {codes[i] for i in inside}:
        members = [i for i in filled if codes[i] == code]
        for i in members:
            q[i] = sum(counts[j] for j in members) / len(members)
    total = sum(counts)
    terms = [p[i] / total * float(torch.log(torch.tensor(p[i] / q[i]).double())) for i in filled]
    return sum(terms) - 1 + sum(q.values()) / total


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.floats(0.06, 0.6), st.integers(2, 13))
def test_divergence_is_that_of_the_procedure(seed: int, scale: float, zero: int) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(seed))
    density, _ = _density(x, 256)
    s, z = torch.tensor([scale], dtype=torch.float64), torch.tensor([float(zero)], dtype=torch.float64)
    found = float(divergence(density, 0, 15)(s, z))
    assert found == pytest.approx(_divergence_by_loops(density, scale, zero, 15), abs=1e-6)


def test_divergence_below_the_histograms_resolution_is_infinite() -> None:
    density, _ = _density(torch.linspace(-1, 1, 100), 64)
    s = torch.tensor([density.width / 2], dtype=torch.float64)
    assert divergence(density, 0, 15)(s, torch.zeros(1, dtype=torch.float64)).isinf()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.floats(-3, 3), st.integers(2, 16), st.sampled_from(["symmetric", "asymmetric"]))
def test_best_range_never_scores_worse_than_the_extremes(seed: int, mean: float, bits: int, scheme: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    density, statistics = _density(torch.randn(1000, generator=generator).pow(3) + mean, 512)
    options = RangeOptions(bits, scheme)
    score = squared_error(density, 0, (1 << bits) - 1)

    def scored(low: Tensor, high: Tensor) -> float:
        ends = low.double()[None], high.double()[None]
        scale, zero = affine_parameters(*ends, bits=bits, scheme=scheme, signed=False)
        return float(score(scale, zero.double()))

    found = scored(*best_range(score, statistics.low, statistics.high, options, widen=True))
    assert found <= scored(statistics.low, statistics.high) * (1 + 1e-5)


def test_widening_is_as_asked() -> None:
    """Eight levels hit both modes, -1 and 5, with a step of 1, more than a seventh of the extremes' distance."""
    x = torch.cat([torch.full((100,), -1.0), torch.full((100,), 5.0)]) + torch.linspace(-0.3, 0.3, 100).repeat(2)
    density, statistics = _density(x, 512)
    options, score = RangeOptions(3, "asymmetric"), squared_error(density, 0, 7)
    low, high = best_range(score, statistics.low, statistics.high, options, widen=True)
    assert float(high - low) == pytest.approx(7, abs=0.1)
    low, high = best_range(score, statistics.low, statistics.high, options, widen=False)
    assert float(high - low) <= 6.6 + 1e-5
