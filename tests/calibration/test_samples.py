"""Sampled positions reproduce the layer they were taken from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qhyvit.calibration.samples import largest, positions, sample_layer, sample_product, sample_value
from qhyvit.graph.capture import capture
from qhyvit.graph.ops import weight_of

LAYERS = {
    "1x1": nn.Conv2d(6, 10, 1),
    "3x3": nn.Conv2d(6, 10, 3, padding=1),
    "strided": nn.Conv2d(6, 10, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(6, 10, 3, padding=2, dilation=2),
    "depthwise": nn.Conv2d(6, 6, 5, padding=2, groups=6),
    "grouped": nn.Conv2d(6, 9, 3, groups=3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_sampled_convolution_is_the_convolution(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 11, 9)
    graph = capture(LAYERS[name], x)
    node = next(n for n in graph.graph.nodes if "conv2d" in n.name)
    y = graph(x)
    sample = sample_layer(graph, node, x, y, torch.randn_like(y), 40, torch.Generator().manual_seed(0))
    weight, bias = weight_of(graph, node)  # type: ignore[misc]
    groups = sample.x.shape[1]
    product = torch.einsum("mgk,gok->mgo", sample.x, weight.view(groups, -1, sample.x.shape[2]))
    assert torch.allclose(product + bias.view(groups, -1), sample.y, atol=1e-5)


@pytest.mark.parametrize("weighed", [False, True])
def test_sums_over_a_sample_are_unbiased(weighed: bool) -> None:
    torch.manual_seed(0)
    score, value = torch.rand(2, 500) ** 4, torch.randn(2, 500)
    sums = []
    for seed in range(400):
        gen = torch.Generator().manual_seed(seed)
        index, importance = positions(score if weighed else None, value.abs(), 50, gen)
        sums.append((importance * value.gather(1, index)).sum(1))
    spread = torch.stack(sums).std(0) / 400**0.5
    assert bool(((torch.stack(sums).mean(0) - value.sum(1)).abs() < 4 * spread).all())


def test_the_extreme_inputs_are_always_taken() -> None:
    extremes = torch.zeros(2, 1000)
    extremes[0, 123], extremes[1, 77] = 9.0, 1.0
    for score in (None, torch.ones(2, 1000)):
        index, _ = positions(score, extremes, 10, torch.Generator().manual_seed(0))
        assert 123 in index[0].tolist()
        assert 77 in index[1].tolist()


def test_every_channel_of_a_depthwise_convolution_shows_its_extremes() -> None:
    """A channel with small numbers is clipped by a range of its own, whatever its neighbours hold."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 24, 24) * torch.logspace(-3, 0, 6).view(-1, 1, 1)
    graph = capture(LAYERS["depthwise"], x)
    node = next(n for n in graph.graph.nodes if "conv2d" in n.name)
    y = graph(x)
    sample = sample_layer(graph, node, x, y, None, 10, torch.Generator().manual_seed(0))
    assert torch.equal(sample.x.abs().amax((0, 2)), x.abs().amax((0, 2, 3)))


def test_a_sampled_product_is_the_product() -> None:
    a, b = torch.randn(2, 4, 16, 8), torch.randn(2, 4, 8, 16)
    sample = sample_product(a, b, a @ b, None, 3, 5, torch.Generator().manual_seed(0))
    assert sample.y.shape == (3, 5, 16)
    assert torch.allclose(sample.a @ sample.b, sample.y, atol=1e-6)


def test_single_numbers_tell_what_clipping_costs() -> None:
    """A few numbers far out, of which a plain sample of this size holds none or too many for their share."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator)
    x[torch.randint(len(x), (40,), generator=generator)] *= 8
    sample = sample_value(x, None, 1000, generator)
    for limit in (3.5, 6.0, 12.0):
        exact = float((x.abs() - limit).clamp_min(0).square().sum())
        told = float(((sample.x.abs() - limit).clamp_min(0).square() * sample.weight).sum())
        assert abs(told - exact) < 0.02 * exact
    assert float(sample.importance.sum()) == pytest.approx(len(x))
    weighed = sample_value(x, torch.full_like(x, 3.0), 1000, generator)
    assert torch.allclose(weighed.weight, 9 * weighed.importance)
    inside = x.abs() < 3
    mean = float((sample.weight * sample.x.square())[sample.x.abs() < 3].sum()) / float(x[inside].square().sum())
    assert abs(mean - 1) < 0.15  # the others are a plain sample


@given(st.integers(0, 2**31), st.integers(1, 3000), st.integers(1, 40))
def test_the_largest_numbers_are_the_largest(seed: int, size: int, count: int) -> None:
    """Also where many are equal, and where they lie behind the last whole piece."""
    count = min(count, size)
    x = torch.randint(0, 50, (size,), generator=torch.Generator().manual_seed(seed)).float()
    values, index = largest(x, count)
    assert torch.equal(values, torch.topk(x, count).values)
    assert torch.equal(x[index], values)
    assert len(set(index.tolist())) == count
