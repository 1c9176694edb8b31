from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qhyvit.errors import QhyvitError
from qhyvit.quantizers import QUANTIZERS, UniformAffine, overflows, uniform_from_range

bits_ = st.integers(2, 8)
schemes = st.sampled_from(["symmetric", "asymmetric"])
seeds = st.integers(0, 2**31 - 1)


def _values(seed: int, *shape: int) -> Tensor:
    """Normal values of a random spread and mean, so that one-sided ranges occur as well."""
    generator = torch.Generator().manual_seed(seed)
    spread, mean = torch.rand(2, generator=generator)
    return torch.randn(shape, generator=generator) * 10 ** (4 * spread - 2) + 10 * (mean - 0.5)


def _fitted(x: Tensor, bits: int, scheme: str, signed: bool = False, **kwargs: object) -> UniformAffine:
    return uniform_from_range(x.amin(), x.amax(), bits=bits, scheme=scheme, signed=signed, **kwargs)


def test_codes_and_values_by_hand() -> None:
    quantizer = UniformAffine(torch.tensor(0.5), torch.tensor(3), bits=4, signed=False, scheme="asymmetric")
    x = torch.tensor([-9.0, -1.5, -0.3, 0.0, 0.25, 0.75, 1.0, 6.0, 99.0])
    assert quantizer.quantize(x).tolist() == [0, 0, 2, 3, 3, 5, 5, 15, 15]  # 0.25 and 0.75 are ties, to even
    assert quantizer(x).tolist() == [-1.5, -1.5, -0.5, 0.0, 0.0, 1.0, 1.0, 6.0, 6.0]


def test_division_is_true_division() -> None:
    """Runtimes divide; x·(1/s) falls on the other side of some ties."""
    scale = torch.tensor(0.1)
    x = torch.arange(-127, 128) * scale + scale / 2
    quantizer = UniformAffine(scale, torch.tensor(0), bits=8, signed=True, scheme="symmetric")
    expected = (x / scale).round().clamp(-128, 127).int()
    assert torch.equal(quantizer.quantize(x), expected)
    assert not torch.equal((x * (1 / scale)).round().clamp(-128, 127).int(), expected)


def test_values_beyond_int32_saturate() -> None:
    quantizer = UniformAffine(torch.tensor(1e-6), torch.tensor(0), bits=8, signed=True, scheme="symmetric")
    assert quantizer.quantize(torch.tensor([1e30, -1e30, torch.inf])).tolist() == [127, -128, 127]


@settings(deadline=None)
@given(seeds, bits_, schemes, st.booleans())
def test_forward_is_dequantize_of_quantize_bit_for_bit(seed: int, bits: int, scheme: str, signed: bool) -> None:
    x = _values(seed, 200)
    quantizer = _fitted(x * 0.7, bits, scheme, signed)
    codes = quantizer.quantize(x)
    values = quantizer.dequantize(codes)
    with torch.no_grad():
        without_gradient = quantizer(x)
    assert codes.dtype == torch.int32
    assert codes.min() >= quantizer.quant_min
    assert codes.max() <= quantizer.quant_max
    assert torch.equal(without_gradient.view(torch.int32), values.view(torch.int32))  # -0.0 differs from 0.0 here
    assert torch.equal(quantizer(x.requires_grad_()).detach().view(torch.int32), values.view(torch.int32))


@settings(deadline=None)
@given(seeds, bits_, schemes, st.booleans())
def test_idempotent(seed: int, bits: int, scheme: str, signed: bool) -> None:
    x = _values(seed, 200)
    quantizer = _fitted(x, bits, scheme, signed)
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)


@settings(deadline=None)
@given(seeds, st.integers(2, 16), schemes, st.booleans(), st.booleans())
def test_zero_is_exact_and_error_at_most_half_a_step(
    seed: int, bits: int, scheme: str, signed: bool, narrow: bool
) -> None:
    x = _values(seed, 500).double()
    quantizer = _fitted(x, bits, scheme, signed, narrow=narrow)
    assert quantizer.scale.dtype == torch.float64
    assert quantizer(torch.zeros(1)).item() == 0.0
    assert (quantizer(x) - x).abs().max() <= quantizer.scale * (0.5 + 1e-9)


@settings(deadline=None)
@given(seeds, st.integers(2, 7), schemes)
def test_more_bits_are_never_worse(seed: int, bits: int, scheme: str) -> None:
    """For values around zero; where all values lie in a narrow band, few levels can happen to be the nearer ones."""
    x = _values(seed, 4096)
    x = x - x.mean() + x.std() / 2
    coarse, fine = ((_fitted(x, b, scheme)(x) - x).square().mean() for b in (bits, bits + 1))
    assert fine <= coarse


@settings(deadline=None)
@given(seeds, bits_, schemes, st.sampled_from([0, 1, 2, -1, -3]))
def test_per_channel_is_stacked_per_tensor(seed: int, bits: int, scheme: str, axis: int) -> None:
    x = _values(seed, 3, 4, 5)
    others = [i for i in range(3) if i != axis % 3]
    quantizer = uniform_from_range(x.amin(others), x.amax(others), bits=bits, scheme=scheme, signed=True, axis=axis)
    channels = [_fitted(channel, bits, scheme, True) for channel in x.unbind(axis)]
    stacked = torch.stack([q(channel) for q, channel in zip(channels, x.unbind(axis), strict=True)], axis)
    codes = torch.stack([q.quantize(channel) for q, channel in zip(channels, x.unbind(axis), strict=True)], axis)
    assert torch.equal(quantizer(x), stacked)
    assert torch.equal(quantizer.quantize(x), codes)
    assert torch.equal(quantizer.dequantize(codes), stacked)


@pytest.mark.parametrize(
    ("low", "high", "needed", "clamped", "extended"),
    [
        (0.5, 1.5, (-255, -256), 4.1e-2, 2.9e-6),
        (2.0, 3.0, (-638,), 2.33, 1.2e-5),
        (10.0, 10.5, (-5228,), 95.1, 1.4e-4),
        (-3.0, -2.0, (637,), 2.33, 1.2e-5),
    ],
)
def test_overflowing_zero_point_of_the_paper(
    low: float, high: float, needed: tuple[int, ...], clamped: float, extended: float
) -> None:
    """int8 on evenly spread values without 0 in their range (Q-HyViT, challenge 2): the zero point overflows."""
    x = torch.linspace(low, high, 200_001, dtype=torch.float64)
    ends = torch.tensor(low), torch.tensor(high)
    assert -128 - round(low / ((high - low) / 255)) in needed
    assert overflows(*ends, bits=8)
    saturating = uniform_from_range(*ends, bits=8, scheme="asymmetric", signed=True, zero="clamp")
    assert int(saturating.zero_point) == (-128 if low > 0 else 127)
    assert (saturating(x) - x).square().mean().item() == pytest.approx(clamped, rel=0.02)
    widened = uniform_from_range(*ends, bits=8, scheme="asymmetric", signed=True, zero="extend")
    assert (widened(x) - x).square().mean().item() == pytest.approx(extended, rel=0.06)


def test_clamp_changes_nothing_where_the_range_holds_zero() -> None:
    low, high = torch.tensor([-1.0, 0.0, -2.0]), torch.tensor([2.0, 1.0, 0.0])
    assert not overflows(low, high, bits=8).any()
    first, second = (
        uniform_from_range(low, high, bits=8, scheme="asymmetric", signed=False, axis=0, zero=zero)
        for zero in ("extend", "clamp")
    )
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(first.zero_point, second.zero_point)


def test_symmetric_scales() -> None:
    low, high = torch.tensor(-3.0), torch.tensor(2.0)
    wide = uniform_from_range(low, high, bits=4, scheme="symmetric", signed=True)
    narrow = uniform_from_range(low, high, bits=4, scheme="symmetric", signed=True, narrow=True)
    unsigned = uniform_from_range(low, high, bits=4, scheme="symmetric", signed=False)
    assert wide.scale.item() == pytest.approx(3 / 7.5)
    assert narrow.scale.item() == pytest.approx(3 / 7)
    assert (wide.zero_point.item(), narrow.zero_point.item(), unsigned.zero_point.item()) == (0, 0, 8)
    x = torch.linspace(-4, 4, 99)
    assert torch.equal(wide(x), unsigned(x))
    assert narrow.quantize(torch.tensor([-3.0, 3.0])).tolist() == [-7, 7]


def test_empty_range_gets_epsilon() -> None:
    eps = torch.finfo(torch.float32).eps
    ends = torch.tensor([0.0, 1e-44, -2.0]), torch.tensor([0.0, 1e-42, 0.5])
    for scheme in ("symmetric", "asymmetric"):
        scale = uniform_from_range(*ends, bits=8, scheme=scheme, signed=True, axis=0).scale
        assert scale[:2].tolist() == [eps, eps]
        assert scale[2] > 0.009


def test_range_as_wide_as_float32_does_not_overflow() -> None:
    end = torch.tensor(torch.finfo(torch.float32).max)
    assert uniform_from_range(-end, end, bits=8, scheme="asymmetric", signed=False).scale.isfinite()


def test_gradient_is_straight_through() -> None:
    quantizer = UniformAffine(torch.tensor(0.5), torch.tensor(2), bits=2, signed=False, scheme="asymmetric")
    x = torch.tensor([-9.0, -1.3, -1.2, 0.0, 0.6, 0.7, 0.8, 9.0], requires_grad=True)  # values -1..0.5, ±0.25
    weight = torch.arange(1.0, 9.0)
    (quantizer(x) * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0]


def test_input_is_left_alone() -> None:
    x = torch.linspace(-1, 1, 50)
    before = x.clone()
    quantizer = _fitted(x, 4, "asymmetric")
    quantizer(x), quantizer.quantize(x)
    codes = torch.arange(5.0)  # already of the dtype that dequantize computes in
    quantizer.dequantize(codes)
    assert torch.equal(x, before)
    assert torch.equal(codes, torch.arange(5.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_cast_to_the_scales(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 101).to(dtype).requires_grad_()
    quantizer = _fitted(x.detach().float(), 8, "asymmetric")
    out = quantizer(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, quantizer(x.detach().float()))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int64])
def test_codes_of_any_integer_type(dtype: torch.dtype) -> None:
    quantizer = UniformAffine(
        torch.tensor(2.0), torch.tensor(100), bits=8, signed=dtype == torch.int8, scheme="asymmetric"
    )
    codes = torch.tensor([-128, 127] if dtype == torch.int8 else [0, 255] if dtype == torch.uint8 else [3, 200])
    assert quantizer.dequantize(codes.to(dtype)).tolist() == [2.0 * (int(c) - 100) for c in codes]


def test_specification_round_trip() -> None:
    x = _values(3, 6, 4)
    quantizer = uniform_from_range(x.amin(1), x.amax(1), bits=5, scheme="asymmetric", signed=True, axis=0)
    spec = json.loads(json.dumps(quantizer.spec()))
    again = QUANTIZERS[spec["kind"]].from_spec(spec, scale=quantizer.scale, zero_point=quantizer.zero_point)
    assert again.spec() == quantizer.spec()
    assert torch.equal(again(x), quantizer(x))
    with pytest.raises(ValueError, match="specification"):
        UniformAffine.from_spec({**spec, "kind": "log2"}, scale=quantizer.scale, zero_point=quantizer.zero_point)
    with pytest.raises(ValueError, match="specification"):
        UniformAffine.from_spec({**spec, "base": 2}, scale=quantizer.scale, zero_point=quantizer.zero_point)


def test_tensors_are_in_the_state_dict() -> None:
    quantizer = _fitted(torch.linspace(-1, 2, 9), 8, "asymmetric")
    other = _fitted(torch.linspace(-5, 5, 9), 8, "asymmetric")
    other.load_state_dict(quantizer.state_dict())
    assert other.scale == quantizer.scale
    assert other.zero_point == quantizer.zero_point
    assert other.zero_point.dtype == torch.int32


@pytest.mark.parametrize(
    ("scale", "zero_point", "changes", "message"),
    [
        (torch.tensor(0.0), torch.tensor(0), {}, "positive"),
        (torch.tensor(torch.nan), torch.tensor(0), {}, "positive"),
        (torch.tensor(1.0), torch.tensor(256), {}, "outside"),
        (torch.tensor(1.0), torch.tensor(-1), {}, "outside"),
        (torch.ones(3), torch.zeros(3), {}, "axis None"),
        (torch.tensor(1.0), torch.tensor(0), {"axis": 1}, "axis 1"),
        (torch.ones(3), torch.zeros(2), {"axis": 1}, "axis 1"),
        (torch.tensor(1.0), torch.tensor(0), {"bits": 17}, "2 to 16 bits"),
        (torch.tensor(1.0), torch.tensor(0), {"scheme": "power"}, "scheme"),
    ],
)
def test_unfit_parameters_are_refused(
    scale: Tensor, zero_point: Tensor, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        UniformAffine(scale, zero_point, **{"bits": 8, "signed": False, "scheme": "asymmetric", **changes})


def test_wrong_number_of_channels_is_refused_rather_than_broadcast() -> None:
    quantizer = UniformAffine(torch.ones(3), torch.zeros(3), bits=8, signed=True, axis=1, scheme="symmetric")
    with pytest.raises(ValueError, match="3 scales for axis 1"):
        quantizer(torch.zeros(2, 1, 4))


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (torch.nan, 1.0), (-torch.inf, 1.0)])
def test_unfit_ranges_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="finite ends"):
        uniform_from_range(torch.tensor(low), torch.tensor(high), bits=8, scheme="symmetric", signed=True)


def test_unknown_quantizer_is_explained() -> None:
    with pytest.raises(QhyvitError, match="Did you mean 'uniform'"):
        QUANTIZERS["uniforn"]
