from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qhyvit.calibration import RANGES, RangeOptions, TensorStatistics, weight_range
from qhyvit.errors import QhyvitError
from qhyvit.quantizers import uniform_from_range


def _normal(seed: int = 0, n: int = 30_000) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def _outliers(x: Tensor) -> Tensor:
    x = x.clone()
    x[:6] *= 40
    return x


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "silu": lambda x: functional.silu(3 * x),
    "gelu": functional.gelu,
    "relu": functional.relu,
    "heavy": lambda x: x * x.abs() ** 1.5,
    "outliers": _outliers,
    "positive": lambda x: x * 0.1 + 4,
    "negative": lambda x: -x.abs() - 1,
    "softmax": lambda x: (2 * x).view(-1, 50).softmax(-1),
    "two modes": lambda x: torch.where(x > 0, x * 0.1 + 5, x * 0.1 - 1),
}


def _statistics(x: Tensor, samples: int = 1 << 20) -> TensorStatistics:
    statistics = TensorStatistics(samples_per_batch=samples)
    statistics.update(x)
    return statistics


def _errors(x: Tensor, lows: Tensor, highs: Tensor, options: RangeOptions) -> Tensor:
    """Mean squared error on the values themselves for each of the ranges (n,)."""
    kwargs = {"bits": options.bits, "scheme": options.scheme, "signed": options.signed, "narrow": options.narrow}
    quantizer = uniform_from_range(lows, highs, axis=0, **kwargs)
    return (quantizer(x.expand(len(lows), -1)) - x).square_().mean(1, dtype=torch.float64)


def _error(x: Tensor, ends: tuple[Tensor, Tensor], options: RangeOptions) -> float:
    return float(_errors(x.flatten(), ends[0][None], ends[1][None], options))


def _brute_force(x: Tensor, options: RangeOptions) -> float:
    """Least error over a dense grid of both ends (asymmetric) or of the common end (symmetric)."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    if options.scheme == "symmetric":
        ends = torch.maximum(-low, high) * torch.linspace(0.005, 1, 200)
        return float(_errors(x, -ends, ends, options).min())
    factors = torch.linspace(0.02, 1, 32 if low < 0 < high else 200)
    lows, highs = (low * factors if low < 0 else low[None]), (high * factors if high > 0 else high[None])
    grid = torch.cartesian_prod(lows, highs)
    return float(_errors(x, grid[:, 0], grid[:, 1], options).min())


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_within_a_percent_of_brute_force(shape: str, bits: int, scheme: str) -> None:
    x = SHAPES[shape](_normal(n=4000)).flatten()
    options = RangeOptions(bits, scheme, signed=True)
    found = _error(x, RANGES["mse"](_statistics(x), options), options)
    assert found <= 1.01 * _brute_force(x, options)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000),
    st.sampled_from(sorted(SHAPES)),
    st.integers(2, 16),
    st.sampled_from(["symmetric", "asymmetric"]),
    st.booleans(),
)
def test_mse_is_never_worse_than_minmax(seed: int, shape: str, bits: int, scheme: str, narrow: bool) -> None:
    x = SHAPES[shape](_normal(seed, 5000))
    options, statistics = RangeOptions(bits, scheme, narrow=narrow), _statistics(x)
    found = _error(x, RANGES["mse"](statistics, options), options)
    extremes = _error(x, RANGES["minmax"](statistics, options), options)
    assert found <= extremes * 1.1  # strict only for the histogram's error, see test_range_search


def test_minmax_is_exact() -> None:
    x = _normal()
    low, high = RANGES["minmax"](_statistics(x, samples=50), RangeOptions(8, "asymmetric"))
    assert (low, high) == (x.min(), x.max())


@pytest.mark.parametrize("share", [99.0, 99.9, 99.99])
def test_percentile_is_numpys_to_a_bin(share: float) -> None:
    x = functional.silu(3 * _normal(n=100_000)) - 0.1
    statistics = _statistics(x)
    _, edges = statistics.histogram()
    width = float(edges[1] - edges[0])
    low, high = RANGES["percentile"](statistics, RangeOptions(8, "asymmetric", percentile=share))
    assert low.item() == pytest.approx(np.percentile(x.numpy(), 100 - share), abs=width)
    assert high.item() == pytest.approx(np.percentile(x.numpy(), share), abs=2 * width)
    low, high = RANGES["percentile"](statistics, RangeOptions(8, "symmetric", percentile=share))
    assert high.item() == pytest.approx(np.percentile(x.abs().numpy(), share), abs=2 * width)
    assert low == -high


def test_percentile_100_is_minmax() -> None:
    x = _normal() + 1
    options = RangeOptions(8, "asymmetric", percentile=100)
    assert RANGES["percentile"](_statistics(x), options) == (x.min(), x.max())


def test_percentile_keeps_zero_where_the_data_hold_it() -> None:
    """99 % of these values are above 0.3, yet the range must not overflow the zero point."""
    x = torch.linspace(0.3, 1, 10_000)
    x[0] = -0.01
    assert RANGES["percentile"](_statistics(x), RangeOptions(8, "asymmetric", percentile=99))[0] == 0
    above = RANGES["percentile"](_statistics(x[1:]), RangeOptions(8, "asymmetric", percentile=99))[0]
    assert above.item() == pytest.approx(0.307, abs=1e-3)


def test_percentile_far_from_zero() -> None:
    low, high = RANGES["percentile"](_statistics(_normal() * 1e-3 - 1e4), RangeOptions(8, "symmetric"))
    assert low == -high
    assert high.item() == pytest.approx(1e4, rel=1e-5)


def test_kl_cuts_rare_outliers_and_keeps_even_values() -> None:
    spread = _normal(n=200_000)
    spread[:3] = torch.tensor([300.0, 200.0, -40.0])
    for scheme in ("symmetric", "asymmetric"):
        low, high = RANGES["kl"](_statistics(spread), RangeOptions(4, scheme))
        assert -8 < low < -2
        assert 2 < high < 8
        even = torch.linspace(-1, 1, 50_000)
        low, high = RANGES["kl"](_statistics(even), RangeOptions(8, scheme))
        assert low.item() == pytest.approx(-1, abs=0.02)
        assert high.item() == pytest.approx(1, abs=0.02)


def test_kl_does_not_collapse_where_clipping_leaves_a_single_code() -> None:
    """A range that loses nearly all values leaves one full code, which a rescaled distribution calls perfect."""
    for x in (_normal() * 0.1 + 4, SHAPES["two modes"](_normal())):
        for bits in (4, 6, 8):
            _, high = RANGES["kl"](_statistics(x), RangeOptions(bits, "asymmetric"))
            assert high > x.max() - 0.4


def test_kl_with_more_codes_than_bins_is_minmax() -> None:
    x = _normal()
    assert RANGES["kl"](_statistics(x), RangeOptions(16, "asymmetric")) == (x.min(), x.max())


@pytest.mark.parametrize("setting", list(RANGES))
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "x", [torch.zeros(9), torch.full((9,), 2.5), torch.full((1,), -1e-30), torch.tensor([0.0, 3.0]), torch.eye(40)]
)
def test_settings_survive_degenerate_tensors(setting: str, scheme: str, x: Tensor) -> None:
    options = RangeOptions(8, scheme)
    assert _error(x, RANGES[setting](_statistics(x), options), options) <= (0.01 * float(x.abs().max())) ** 2


@pytest.mark.parametrize("setting", list(RANGES))
def test_unbounded_options_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="percentile"):
        RangeOptions(8, "symmetric", percentile=0.9999)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("setting", ["minmax", "percentile", "mse", "kl"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_weight_range_per_channel_is_stacked_per_tensor(setting: str, scheme: str, axis: int) -> None:
    weight = _normal(n=360).view(5, 6, 12)
    options = RangeOptions(4, scheme, percentile=95, signed=True)
    low, high = weight_range(weight, setting, options, axis)
    for i, channel in enumerate(weight.unbind(axis)):
        alone = weight_range(channel, setting, options, None)
        assert (low[i].item(), high[i].item()) == pytest.approx((alone[0].item(), alone[1].item()), rel=1e-5)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("narrow", [False, True])
def test_weight_mse_is_the_best_of_its_candidates(scheme: str, narrow: bool) -> None:
    weight = _outliers(_normal(n=2000)) + 0.3
    options = RangeOptions(4, scheme, signed=True, narrow=narrow)
    found = _error(weight, weight_range(weight, "mse", options, None), options)
    factors = torch.linspace(0.01, 1, 100)
    candidates = _errors(weight, weight.min() * factors, weight.max() * factors, options)
    least = float(candidates.min())
    assert found < float(candidates[-1])
    assert found == pytest.approx(least) if scheme == "symmetric" else found <= least * (1 + 1e-6)


def test_weight_percentile_is_torchs_quantile() -> None:
    weight = _normal(n=1003).view(17, 59)
    options = RangeOptions(8, "asymmetric", percentile=97)
    low, high = weight_range(weight, "percentile", options, 0)
    assert torch.allclose(low, weight.quantile(0.03, dim=1))
    assert torch.allclose(high, weight.quantile(0.97, dim=1))


def test_weight_range_of_a_zero_channel() -> None:
    weight = torch.zeros(3, 4)
    weight[1] = 1
    for setting in RANGES:
        low, high = weight_range(weight, setting, RangeOptions(8, "symmetric", signed=True), 0)
        quantizer = uniform_from_range(low, high, bits=8, scheme="symmetric", signed=True, axis=0)
        assert torch.allclose(quantizer(weight), weight, atol=0.01)


def test_weight_range_explains_a_typo_and_refuses_nan() -> None:
    with pytest.raises(QhyvitError, match="Did you mean 'minmax'"):
        weight_range(torch.ones(2), "minmx", RangeOptions(8, "symmetric"), None)
    with pytest.raises(ValueError, match="not finite"):
        weight_range(torch.tensor([1.0, torch.nan]), "mse", RangeOptions(8, "symmetric"), None)
