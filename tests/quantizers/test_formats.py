"""The number formats beside the uniform one, each against its definition."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qhyvit.quantizers import QUANTIZERS, Quantizer, uniform_from_range
from qhyvit.quantizers.adalog import AdaLog
from qhyvit.quantizers.log import Log2, LogSqrt2
from qhyvit.quantizers.power_of_two import PowerOfTwoFactor
from qhyvit.quantizers.sulq import ShiftUniformLog2, sulq_from_range
from qhyvit.quantizers.twin import TwinUniform, twin_for_activation, twin_for_probabilities

ONE = torch.ones(())
FORMATS: dict[str, Callable[[int], Quantizer]] = {
    "log2": lambda b: Log2(ONE, bits=b),
    "log-sqrt2": lambda b: LogSqrt2(ONE * 0.7, bits=b),
    "adalog": lambda b: AdaLog(ONE * 2, bits=b, q=23, shift=0.17),
    "sulq": lambda b: sulq_from_range(ONE * 1e-5, ONE, 1e-4, bits=b),
    "twin-probabilities": lambda b: twin_for_probabilities(0.5, bits=b),
    "twin-activation": lambda b: twin_for_activation(ONE * 0.1, -0.16997, bits=b),
}
bits_ = st.integers(2, 8)
names = st.sampled_from(sorted(FORMATS))


def values(seed: int, count: int = 300) -> Tensor:
    """Numbers of many magnitudes, some negative, some 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.exp2(torch.rand(count, generator=generator) * 20 - 17)
    x[::5] *= -0.1
    x[::7] = 0
    return x


def probabilities(rows: int = 2000, columns: int = 197, concentration: float = 0.05) -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.Dirichlet(torch.full((columns,), concentration)).sample((rows,))


def softmax_of_normal(deviation: float) -> Tensor:
    logits = torch.randn(2000, 197, generator=torch.Generator().manual_seed(1)) * deviation
    return torch.softmax(logits, 1)


def mse(quantizer: Quantizer, x: Tensor) -> float:
    with torch.no_grad():
        return float((quantizer(x) - x).square().mean())


@settings(deadline=None)
@given(names, bits_, st.integers(0, 1000))
def test_codes_lie_in_range_and_reading_them_is_fake_quantization(name: str, bits: int, seed: int) -> None:
    quantizer, x = FORMATS[name](bits), values(seed)
    codes = quantizer.quantize(x)
    assert codes.dtype == torch.int32
    assert int(codes.min()) >= 0
    assert int(codes.max()) < quantizer.code_count
    assert torch.equal(quantizer(x), quantizer.dequantize(codes))
    assert bool(quantizer(x).isfinite().all())


@settings(deadline=None)
@given(names.filter(lambda name: name != "twin-probabilities"), bits_)  # its sides meet, one ends where one begins
def test_what_a_code_means_is_quantized_to_itself(name: str, bits: int) -> None:
    quantizer = FORMATS[name](bits)
    levels = quantizer.dequantize(torch.arange(quantizer.code_count))
    assert torch.allclose(quantizer(levels), levels, rtol=1e-5, atol=1e-7)


@settings(deadline=None)
@given(names, st.integers(3, 8), st.integers(0, 1000))
def test_quantization_is_monotonous(name: str, bits: int, seed: int) -> None:
    found = FORMATS[name](bits)(values(seed).sort().values)
    assert bool((found.diff() >= 0).all())


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_gradient_is_straight_through_where_nothing_was_clipped(name: str) -> None:
    quantizer = FORMATS[name](4)
    x = torch.tensor([0.03, 0.5, 50.0, -40.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_format_comes_back_from_its_specification(name: str) -> None:
    quantizer = FORMATS[name](5)
    spec = json.loads(json.dumps(quantizer.spec()))
    again = QUANTIZERS[spec["kind"]].from_spec(spec, **quantizer.state_dict())
    x = values(4)
    assert torch.equal(again(x), quantizer(x))
    assert not quantizer.executable
    with pytest.raises(ValueError, match="not the specification"):
        type(quantizer).from_spec({**spec, "colour": "red"}, **quantizer.state_dict())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_log2_levels_are_powers_of_two_and_zero(bits: int) -> None:
    levels = Log2(ONE * 0.5, bits=bits).dequantize(torch.arange(2**bits + 1)).tolist()
    # below the smallest float32 nothing is left but 0
    assert levels == [float(torch.tensor(0.5 * 2.0**-k)) for k in range(2**bits)] + [0.0]


def test_log2_masks_what_its_exponents_do_not_reach() -> None:
    threshold = 2 ** -(2**3 - 0.5)
    quantizer = Log2(ONE, bits=3)
    found = quantizer(torch.tensor([threshold * 1.001, threshold * 0.999, 0.0, -1.0, 2.0]))
    assert found.tolist() == [2**-7, 0, 0, 0, 1]


def test_log_sqrt2_as_published() -> None:
    """s·2^(-⌈k/2⌉), times √2 where k is odd (RepQ-ViT)."""
    levels = LogSqrt2(ONE * 0.3, bits=4).dequantize(torch.arange(16))
    expected = [0.3 * 2.0 ** -math.ceil(k / 2) * (math.sqrt(2) if k % 2 else 1) for k in range(16)]
    assert torch.allclose(levels, torch.tensor(expected), rtol=1e-6)


@settings(deadline=None)
@given(bits_, st.integers(10, 138))
def test_adalog_table_is_close_to_the_ideal_power(bits: int, q: int) -> None:
    found = AdaLog(ONE.double(), bits=bits, q=q).dequantize(torch.arange(2**bits))
    exponents = torch.arange(2**bits).double() * q / 37
    ideal = torch.exp2(-exponents)
    whole = 2 ** (bits + 1) - 2
    assert bool(((found - ideal).abs() <= (1 + 1e-9) / (2 * whole) * torch.exp2(-exponents.floor())).all())


def test_adalog_of_37_is_log2() -> None:
    x = values(2).abs()
    assert torch.equal(AdaLog(ONE, bits=4, q=37)(x), Log2(ONE, bits=4)(x))


def test_adalog_shift_folds_into_the_next_bias() -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(50, 8, dtype=torch.float64))
    weight, bias = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    shift = 0.1699712
    shifted = AdaLog(ONE.double() * 3, bits=4, q=20, shift=shift)
    plain = AdaLog(ONE.double() * 3, bits=4, q=20)
    direct = shifted(x) @ weight.t() + bias
    folded = plain(x + shift) @ weight.t() + (bias - shift * weight.sum(1))
    assert torch.allclose(direct, folded, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("deviation", "q"), [(2, 20), (8, 12)])
def test_the_best_base_follows_the_scores_spread(deviation: float, q: int) -> None:
    """Sharper rows want finer exponents (37 would be log2, 18.5 log √2)."""
    x = softmax_of_normal(deviation)
    errors = {n: mse(AdaLog(ONE, bits=4, q=n), x) for n in range(10, 40)}
    assert abs(min(errors, key=errors.__getitem__) - q) <= 1
    assert errors[q] < mse(LogSqrt2(ONE, bits=4), x) < mse(Log2(ONE, bits=4), x)


def test_sulq_golden_numbers() -> None:
    x = torch.tensor([1.08e-8, 2.38e-5, 0.868])
    quantizer = sulq_from_range(x.min(), x.max(), 1e-6, bits=3)
    assert float(quantizer.scale) == pytest.approx(2.815977, rel=1e-6)
    assert int(quantizer.zero_point) == 0
    assert quantizer.quantize(x).tolist() == [7, 5, 0]
    assert quantizer(x).tolist() == pytest.approx([-4.6e-8, 6.0035e-5, 0.999999], rel=0.01)


@settings(deadline=None)
@given(bits_, st.floats(1e-7, 1.0), st.floats(1e-9, 0.5), st.floats(0.5, 1.0))
def test_sulq_levels_are_whole_powers_of_two_less_eta(bits: int, eta: float, low: float, high: float) -> None:
    quantizer = sulq_from_range(torch.tensor(low).double(), torch.tensor(high).double(), eta, bits=bits)
    levels = quantizer.dequantize(torch.arange(2**bits)) + eta
    assert len(levels) == quantizer.code_count == 2**bits
    mantissa, _ = torch.frexp(levels)
    assert torch.allclose(mantissa, torch.full_like(mantissa, 0.5), rtol=1e-6) or eta > 1e9 * float(levels.min())


def test_sulq_is_finite_at_and_below_zero() -> None:
    quantizer: ShiftUniformLog2 = sulq_from_range(torch.tensor(0.0), ONE, 1e-3, bits=4)
    assert bool(quantizer(torch.tensor([0.0, -1.0, -1e-3, 5.0])).isfinite().all())


def best_twin(x: Tensor, bits: int) -> float:
    return min(mse(twin_for_probabilities(2.0**-m, bits=bits), x) for m in range(20))


@pytest.mark.parametrize(("bits", "twin", "plain"), [(8, 6.1e-8, 2.9e-7), (6, 9.1e-7, 3.5e-6), (4, 1.3e-5, 3.9e-5)])
def test_twin_uniform_errors_on_peaked_rows(bits: int, twin: float, plain: float) -> None:
    x = probabilities()
    assert best_twin(x, bits) == pytest.approx(twin, rel=0.1)
    uniform = uniform_from_range(torch.zeros(()), ONE, bits=bits, scheme="asymmetric", signed=False)
    assert mse(uniform, x) == pytest.approx(plain, rel=0.1)


def test_twin_uniform_is_one_side_or_the_other_never_their_sum() -> None:
    quantizer = twin_for_probabilities(0.25, bits=4)
    x = torch.tensor([0.0, 0.1, 0.24, 0.25, 0.5, 1.0])
    fine, coarse = 0.25 / 7, 1 / 7
    expected = [0, 3 * fine, 7 * fine, 2 * coarse, 3 * coarse, 1]  # 0.5 / coarse is just below 3.5 in float32
    assert quantizer(x).tolist() == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(bits_)
def test_twin_uniform_of_an_activation_uses_all_codes(bits: int) -> None:
    half = 2 ** (bits - 1)
    quantizer: TwinUniform = twin_for_activation(ONE * 0.5, -0.16997, bits=bits)
    levels = sorted(quantizer.dequantize(torch.arange(2**bits)).tolist())
    negative = [-(half - i) * 0.16997 / half for i in range(half)]
    assert levels == pytest.approx(negative + [0.5 * i for i in range(half)], rel=1e-5)


def test_power_of_two_factors_by_hand() -> None:
    """A channel of 1/8 the range gets the finest scale, and an error of its own scale instead of the tensor's."""
    torch.manual_seed(0)
    x = torch.rand(500, 4) * torch.tensor([0.12, 0.24, 0.49, 1.0])
    quantizer = PowerOfTwoFactor.fitted(x, torch.zeros(()), ONE, bits=8, axis=-1)
    assert quantizer.exponents.tolist() == [0, 1, 2, 3]
    assert float(quantizer.base_scale) == pytest.approx(1 / 255 / 8)
    plain = uniform_from_range(torch.zeros(()), ONE, bits=8, scheme="asymmetric", signed=False)
    error, without = (quantizer(x) - x).square().mean(0), (plain(x) - x).square().mean(0)
    assert bool((error <= without).all())
    assert float(error[0]) < 0.05 * float(without[0])
    assert torch.equal(quantizer(x)[:, 3], plain(x)[:, 3])


def test_power_of_two_factor_refuses_other_scales_and_comes_back() -> None:
    zero = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="powers of two"):
        PowerOfTwoFactor(torch.tensor([0.1, 0.3]), zero, torch.tensor([0, 1]), bits=8, axis=1)
    quantizer = PowerOfTwoFactor(torch.tensor([0.1, 0.2]), zero, torch.tensor([0, 1]), bits=8, axis=1)
    spec = json.loads(json.dumps(quantizer.spec()))
    again = QUANTIZERS[spec["kind"]].from_spec(spec, **quantizer.state_dict())
    x = torch.rand(5, 2) * 20
    assert torch.equal(again(x), quantizer(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Log2(ONE, bits=9), "2 to 8 bits"),
        (lambda: Log2(-ONE, bits=4), "positive"),
        (lambda: AdaLog(ONE, bits=4, q=9), "10 to 138"),
        (lambda: TwinUniform(ONE, ONE, ONE, bits=4, mirrored=True), "split at 0"),
    ],
)
def test_arguments_out_of_range_are_refused(build: Callable[[], Quantizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
