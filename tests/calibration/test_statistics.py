from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qhyvit.calibration import TensorStatistics

seeds = st.integers(0, 2**31 - 1)


def _seen(*batches: Tensor, **kwargs: int) -> TensorStatistics:
    statistics = TensorStatistics(**kwargs)
    for batch in batches:
        statistics.update(batch)
    return statistics


def _growing(seed: int) -> list[Tensor]:
    """Batches whose size, spread and mean wander, so that the histogram both moves and widens."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(int(rng.integers(1, 8))):
        spread, mean = 10 ** rng.uniform(-3, 3), rng.normal() * 10 ** rng.uniform(-2, 3)
        batches.append(torch.from_numpy(rng.normal(mean, spread, int(rng.integers(1, 300)))).float())
    return batches


@settings(deadline=None)
@given(seeds, st.sampled_from([2, 3, 16, 255, 2048]))
def test_merged_histogram_is_numpys_on_the_same_edges(seed: int, bins: int) -> None:
    batches = _growing(seed)
    statistics = _seen(*batches, bins=bins)
    counts, edges = statistics.histogram()
    values = torch.cat(batches).double().numpy()
    assert counts.shape == (bins,)
    assert np.array_equal(counts.numpy(), np.histogram(values, edges.numpy())[0])
    assert statistics.low == values.min()
    assert statistics.high == values.max()
    assert edges[0] <= statistics.low
    assert statistics.high < edges[-1]


@settings(deadline=None)
@given(seeds)
def test_zero_is_an_edge_wherever_the_bins_reach_it(seed: int) -> None:
    statistics = _seen(*_growing(seed), bins=64)
    _, edges = statistics.histogram()
    width = edges[1] - edges[0]
    assert torch.equal(edges / width, (edges / width).round())
    assert torch.log2(width) == torch.log2(width).round()
    assert (edges == 0).any() or edges[0] > 0 or edges[-1] < 0


@settings(deadline=None)
@given(seeds, st.permutations(range(6)))
def test_chunks_and_their_order_do_not_matter(seed: int, order: list[int]) -> None:
    values = torch.cat(_growing(seed))
    chunks = values.tensor_split(6)
    once, often = _seen(values), _seen(*(chunks[i] for i in order))
    for first, second in zip(once.histogram(), often.histogram(), strict=True):
        assert torch.equal(first, second)
    assert (once.low, once.high, once.count, once.zeros) == (often.low, often.high, often.count, often.zeros)


@settings(deadline=None)
@given(seeds, st.integers(0, 7))
def test_merged_is_one_that_saw_all(seed: int, split: int) -> None:
    batches = [torch.stack([b, b.flip(0) - 1]) for b in _growing(seed)]
    first, second = (_seen(*part, channel_axis=0, bins=16) for part in (batches[:split], batches[split:]))
    merged, whole = first.merged(second), _seen(*batches, channel_axis=0, bins=16)
    for one, other in zip(merged.histogram(), whole.histogram(), strict=True):
        assert torch.equal(one, other)
    assert (merged.low, merged.high, merged.count, merged.zeros) == (whole.low, whole.high, whole.count, whole.zeros)
    assert torch.equal(merged.channel_low, whole.channel_low)
    assert torch.equal(merged.channel_high, whole.channel_high)
    assert first.count + second.count == merged.count  # neither was changed
    with pytest.raises(ValueError, match="bins"):
        first.merged(TensorStatistics(bins=8))


def test_at_least_about_half_of_the_bins_are_used() -> None:
    for seed in range(20):
        statistics = _seen(*_growing(seed))
        counts, edges = statistics.histogram()
        used = counts.nonzero()
        assert int(used[-1]) >= len(counts) // 2 - 2, edges


def test_sample_meets_every_channel_equally_and_counts_for_all() -> None:
    """A stride of 64 through 64 channels would only ever see one of them."""
    channels = torch.arange(64.0)
    for x in (channels.expand(16, 500, 64).clone(), channels[:, None, None].expand(8, 64, 25, 40).clone()):
        counts, _ = _seen(x, bins=64, samples_per_batch=6000).histogram()
        assert counts.sum().item() == pytest.approx(x.numel())
        assert (counts / counts.mean() - 1).abs().max() < 0.05


def test_batches_weigh_by_their_size_when_sampled() -> None:
    large, small = torch.full((50_000,), -0.5), torch.full((5_000,), 0.5)
    statistics = _seen(large, small, samples_per_batch=500)
    counts, edges = statistics.histogram()
    assert counts[edges[:-1] < 0].sum() == pytest.approx(50_000)
    assert counts[edges[:-1] >= 0].sum() == pytest.approx(5_000)


def test_extremes_are_exact_and_enter_when_sampled() -> None:
    x = torch.zeros(100_000)
    x[777], x[31_338] = 12.3, -4.56
    statistics = _seen(x, samples_per_batch=100)
    counts, edges = statistics.histogram()
    assert (statistics.low.item(), statistics.high.item()) == (x.min().item(), x.max().item())
    for value in (12.3, -4.56):
        assert counts[int((edges <= value).sum()) - 1] >= 1


def test_zeros_are_counted() -> None:
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).relu()
    exact = _seen(x)
    assert exact.zeros == int((x == 0).sum())
    sampled = _seen(x, samples_per_batch=5000)
    counts, edges = sampled.histogram()
    assert sampled.zeros == pytest.approx(exact.zeros, rel=0.05)
    assert sampled.zeros <= counts[edges[:-1] == 0]


@pytest.mark.parametrize("axis", [1, -1, 0])
def test_channel_extremes(axis: int) -> None:
    shapes = [(4, 5, 6), (4, 5, 6)] if axis == 0 else [(3, 5, 6), (7, 5, 6)]
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    statistics = _seen(*batches, channel_axis=axis)
    together = torch.cat([batch.movedim(axis, 0).flatten(1) for batch in batches], 1)
    assert statistics.channel_low is not None
    assert statistics.channel_high is not None
    assert torch.equal(statistics.channel_low, together.amin(1))
    assert torch.equal(statistics.channel_high, together.amax(1))
    assert statistics.low == together.min()
    assert statistics.count == together.numel()


def test_no_channel_extremes_unless_asked() -> None:
    statistics = _seen(torch.randn(3, 4))
    assert statistics.channel_low is None
    assert statistics.channel_high is None


def test_channel_extremes_do_not_follow_the_callers_tensor() -> None:
    x = torch.tensor([1.0, -2.0])
    statistics = _seen(x, channel_axis=0)
    x.zero_()
    assert statistics.channel_low is not None
    assert statistics.channel_low.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("axis", [None, 1])
def test_not_finite_is_refused_and_leaves_no_trace(value: float, axis: int | None) -> None:
    good = torch.linspace(-1, 2, 12).view(3, 4)
    statistics = _seen(good, channel_axis=axis)
    bad = good * 5
    bad[2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(bad)
    assert torch.equal(statistics.histogram()[0], _seen(good).histogram()[0])
    assert (statistics.low, statistics.high, statistics.count) == (good.min(), good.max(), 12)


def test_other_number_of_channels_is_refused() -> None:
    statistics = _seen(torch.zeros(2, 4), channel_axis=1)
    with pytest.raises(ValueError, match="5 channels"):
        statistics.update(torch.zeros(2, 5))


def test_nothing_seen() -> None:
    statistics = _seen(torch.zeros(0, 4))
    assert statistics.count == 0
    for ask in (lambda: statistics.low, lambda: statistics.high, statistics.histogram):
        with pytest.raises(ValueError, match="no values"):
            ask()


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-38, 3e38, -7.25, 1e-45])
def test_constant_tensors(value: float) -> None:
    x = torch.full((3, 7), value)
    counts, edges = _seen(x).histogram()
    held = int(counts.argmax())
    assert counts[held] == 21
    assert edges[held] <= x[0, 0].double() < edges[held + 1]


def test_from_tiny_to_huge() -> None:
    statistics = _seen(torch.zeros(5), torch.full((7,), 1e-30), torch.full((9,), -3e38), torch.full((2,), 3e38))
    counts, edges = statistics.histogram()
    assert counts[(edges[:-1] == 0)] == 12
    assert (counts.sum(), counts[0]) == (23, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    statistics, as_double = _seen(x), _seen(x.double())
    assert torch.equal(statistics.histogram()[0], as_double.histogram()[0])
    assert statistics.low == x.min()
    assert statistics.low.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_memory_format_does_not_matter() -> None:
    x = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    for y in (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, ::2], x.expand(3, 2, 6, 5, 4)):
        same = _seen(y.clone(memory_format=torch.contiguous_format))
        assert torch.equal(_seen(y).histogram()[0], same.histogram()[0])


@pytest.mark.parametrize("sizes", [{"bins": 1}, {"samples_per_batch": 0}])
def test_unfit_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        TensorStatistics(**sizes)
