"""Errors of many candidates at once against one candidate at a time, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qhyvit.calibration.samples import LayerSample, ProductSample
from qhyvit.quantizers.uniform import uniform_from_range
from qhyvit.search.candidates import Candidates
from qhyvit.search.errors import InputError, LayerError, WeightError, product_error, product_errors


def case(groups: int, weighting: str, *, centred: bool = False, taps: int = 3) -> tuple[LayerError, Tensor, Tensor]:
    """A grouped layer with 4 inputs and 6 outputs a group; its weight (C_out, K) and weights of the errors."""
    gen = torch.Generator().manual_seed(groups)
    m, k, o = 50, 4 * taps, 6
    x, weight = torch.randn(m, groups, k, generator=gen), torch.randn(groups * o, k, generator=gen)
    bias = torch.randn(groups * o, generator=gen)
    y = torch.einsum("mgk,gok->mgo", x, weight.view(groups, o, k)) + bias.view(groups, o)
    importance = torch.rand(m, 1, 1, generator=gen).expand(m, groups, o)
    if weighting == "g":
        importance = torch.rand(m, groups, o, generator=gen)
    channel_of = torch.arange(groups * k).div(taps, rounding_mode="floor").view(groups, k)
    return LayerError(LayerSample(x, y, importance), weight, bias, channel_of, centred=centred), weight, importance


def written_out(error: LayerError, x: Tensor, weight: Tensor, importance: Tensor) -> Tensor:
    """Σ_n w (ô - o)² per output, with the best constant taken out where the error is centred."""
    target = error.target.transpose(0, 1)
    e = torch.einsum("gmk,gok->mgo", x, weight.view(x.shape[0], -1, x.shape[2])) - target
    if error.centred:
        e = e - (e * importance).sum(0) / importance.sum(0)
    return (e.square() * importance).sum(0).flatten()


@pytest.mark.parametrize("taps", [3, 20])  # 12 inputs, and 80: more than positions
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_gram_matrices_give_the_error_of_running_the_layer(groups: int, centred: bool, taps: int) -> None:
    error, weight, importance = case(groups, "positions", centred=centred, taps=taps)
    x = error.quantized_input(uniform_from_range(*error.x.aminmax(), bits=4, scheme="asymmetric", signed=False))
    low, high = (torch.rand(7, len(weight)) * end for end in (-2.0, 2.0))
    candidates = Candidates.from_ranges(low, high, bits=3, signed=True, scheme="asymmetric")
    grams = WeightError(error, x, weight)
    expected = []
    for i in range(7):
        q = uniform_from_range(low[i], high[i], bits=3, scheme="asymmetric", signed=True, axis=0)
        expected.append(written_out(error, x, q(weight), importance))
    assert error.uniform
    torch.testing.assert_close(grams(candidates), torch.stack(expected), rtol=1e-3, atol=1e-3)


def test_with_gradients_the_layer_is_run() -> None:
    error, weight, importance = case(2, "g")
    candidates = Candidates.from_ranges(
        -torch.rand(5, 1) - 0.5, torch.rand(5, 1) + 0.5, bits=4, signed=True, scheme="symmetric"
    )
    grams = WeightError(error, error.x, weight)
    coded = candidates(weight)
    expected = torch.stack([written_out(error, error.x, w, importance) for w in coded])
    assert not error.uniform
    torch.testing.assert_close(grams(candidates), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("weighting", ["positions", "g"])
@pytest.mark.parametrize("taps", [3, 1])  # 12 inputs for 6 outputs, and 4, which are rotated
@pytest.mark.parametrize("centred", [False, True])
def test_input_candidates_one_by_one_give_the_same(centred: bool, taps: int, weighting: str, per_channel: bool) -> None:
    error, weight, importance = case(2, weighting, centred=centred, taps=taps)
    weight = weight + 0.1 * torch.randn(weight.shape)  # a quantized one: no combination of inputs gives the targets
    channels = 8 if per_channel else 1
    low, high = -torch.rand(4, channels) * 2, torch.rand(4, channels) * 2
    candidates = Candidates.from_ranges(low, high, bits=3, signed=False, scheme="asymmetric")
    total, each = (InputError(error, error.grouped(weight), each=e)(candidates) for e in (False, True))
    for i in range(4):
        x = error.x.clone()
        for g in range(2):
            for k in range(4 * taps):
                c = g * 4 + k // taps if per_channel else 0
                q = uniform_from_range(low[i, c], high[i, c], bits=3, scheme="asymmetric", signed=False)
                x[g, :, k] = q(x[g, :, k])
        expected = written_out(error, x, weight, importance)
        torch.testing.assert_close(each[i], expected, rtol=1e-3, atol=1e-3)
        assert float(total[i]) == pytest.approx(float(expected.sum()), rel=1e-4)


def test_depthwise_products_are_those_of_matrices() -> None:
    gen = torch.Generator().manual_seed(0)
    x, y, importance = (torch.randn(20, 5, k, generator=gen) for k in (9, 1, 1))
    weight = torch.randn(5, 1, 3, 3, generator=gen)
    error = LayerError(LayerSample(x, y, importance.abs()), weight, None, torch.arange(5)[:, None].expand(5, 9))
    inputs = torch.randn(3, 5, 20, 9, generator=gen)
    torch.testing.assert_close(error.product(inputs, error.weight), inputs @ error.weight)
    low, high = -torch.rand(4, 1, generator=gen), torch.rand(4, 1, generator=gen)
    candidates = Candidates.from_ranges(low, high, bits=3, signed=False, scheme="asymmetric")
    total, each = (InputError(error, error.weight, each=e)(candidates) for e in (False, True))
    torch.testing.assert_close(total, each.sum(1, keepdim=True))


def test_products_by_head() -> None:
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 5, 4, generator=gen), torch.randn(6, 4, 3, generator=gen)
    head = torch.tensor([0, 1, 1, 0, 1, 0])
    sample = ProductSample(a, b, a @ b, torch.rand(6, 5, 3, generator=gen), head)
    low, high = -torch.rand(3, 2) - 1, torch.rand(3, 2) + 1
    found = product_errors(sample, "b", a, Candidates.from_ranges(low, high, bits=3, signed=False, scheme="asymmetric"))
    for i in range(3):
        total = 0.0
        for s in range(6):
            ends = low[i, head[s]], high[i, head[s]]
            q = uniform_from_range(*ends, bits=3, scheme="asymmetric", signed=False)
            total += float(((a[s] @ q(b[s]) - sample.y[s]).square() * sample.weight[s]).sum())
        assert float(found[i, 0]) == pytest.approx(total, rel=1e-4)


def test_products_of_a_value_with_itself() -> None:
    """Both operands are coded by the candidate."""
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 5, 4, generator=gen), torch.randn(6, 4, 3, generator=gen)
    sample = ProductSample(a, b, a @ b, torch.rand(6, 5, 3, generator=gen), torch.zeros(6, dtype=torch.int64))
    candidates = Candidates.from_ranges(-torch.ones(1, 1), torch.ones(1, 1), bits=3, signed=False, scheme="asymmetric")
    q = candidates.build(None)
    exact = float(((q(a) @ q(b) - sample.y).square() * sample.weight).sum())
    assert float(product_errors(sample, "ab", a, candidates)) == pytest.approx(exact, rel=1e-5)


def test_products_whose_numbers_weigh_alike() -> None:
    gen = torch.Generator().manual_seed(0)
    a, b, y = (torch.randn(6, n, m, generator=gen) for n, m in ((5, 4), (4, 3), (5, 3)))
    sample = ProductSample(a, b, y, torch.ones_like(y), torch.zeros(6, dtype=torch.int64))
    exact = sum((a[s] @ b[s] - y[s]).square().sum() for s in range(6))
    assert float(product_error(sample, a, b)) == pytest.approx(float(exact), rel=1e-5)
    assert torch.allclose(product_error(sample, torch.stack([a, a]), b), exact.expand(2))
