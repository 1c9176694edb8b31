"""FQ-ViT and HyQ: integer softmax and norms where the scope has them, distribution scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid import logits, problem
from qhyvit.graph.ops import aten
from qhyvit.methods import METHODS, Problem
from qhyvit.methods.fqvit import fqvit
from qhyvit.methods.hyq import hyq
from qhyvit.operators import IntegerLayerNorm, IntegerSoftmax
from qhyvit.quantized import QuantizedModel
from qhyvit.quantizers.log import Log2
from qhyvit.quantizers.power_of_two import PowerOfTwoFactor
from qhyvit.quantizers.uniform import affine_parameters, fake_quantize, uniform_from_range
from qhyvit.search.distribution import distribution_scaling, scaled_outputs


def test_full_scope_has_factors_before_norms_and_both_operators() -> None:
    case = problem("w8a8", scope="full")
    parameters = fqvit(case)
    factors = [q for q in parameters.activations.values() if isinstance(q, PowerOfTwoFactor)]
    assert len(factors) == 3  # two LayerNorms and the GroupNorm
    kinds = [type(o) for o in parameters.operators.values()]
    assert kinds.count(IntegerLayerNorm) == 2
    assert kinds.count(IntegerSoftmax) == 1
    (softmax,) = [q for q in parameters.activations.values() if isinstance(q, Log2)]
    assert softmax.bits == 8
    assert parameters.notes == []


def test_partial_scope_says_what_stays_float() -> None:
    parameters = fqvit(problem("w8a8"))
    assert not parameters.operators
    said = " ".join(parameters.notes)
    for sentence in ("made for scope full", "no norm's input is quantized", "log2 codes of the float softmax"):
        assert sentence in said


def test_an_integer_norm_computes_the_float_one_to_its_own_precision() -> None:
    """The same parameters with and without the integer operators, by the noise that they add to the logits."""
    case = problem("w8a8", scope="full", integer_softmax=False)
    parameters = fqvit(case)
    images = next(case.pictures())
    model = QuantizedModel(case.graph, case.sites, parameters, case.recipe, {}, False)
    with torch.no_grad():
        integer, plain, exact = model.simulation()(images), model.simulation(integer=False)(images), case.graph(images)
    assert not torch.equal(integer, plain)
    assert float((integer - exact).norm() / exact.norm()) < 0.05


def test_a_runtime_gets_neither_and_is_told_of_all_four() -> None:
    parameters = fqvit(problem("w8a8", scope="full", target="onnxruntime"))
    assert not parameters.operators
    assert {q.kind for q in parameters.activations.values()} == {"uniform"}
    said = " ".join(parameters.notes)
    assert "no kernel for power-of-two; 3 inputs of norms have one scale per tensor instead" in said
    assert "no kernel for log2; 1 softmax outputs are uint8 with step 1/255" in said


# Distribution scaling ------------------------------------------------------------------------------------------------


def uneven(channels: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, channels, generator=generator) * torch.logspace(-1.5, 0.5, channels)
    return x, torch.randn(6, channels, generator=generator)


def test_at_one_the_scaled_outputs_are_those_of_the_plain_quantizers() -> None:
    x, weight = uneven()
    low, high = x.amin(0), x.amax(0)
    found = scaled_outputs(x, weight, low, high, torch.ones(12), 6, 6)
    inputs = uniform_from_range(low.min(), high.max(), bits=6, scheme="asymmetric", signed=False)
    reach = weight.abs().amax(1)
    weights = uniform_from_range(-reach, reach, bits=6, scheme="symmetric", signed=True, axis=0)
    assert torch.allclose(found, inputs(x) @ weights(weight).t(), atol=1e-4)


def test_the_learned_factors_even_the_channels_out() -> None:
    x, weight = uneven()
    alpha, loss, plain = distribution_scaling([(x, weight)], x.amin(0), x.amax(0), 8, 4, steps=200, rate=0.05)
    assert loss < 0.5 * plain
    assert bool((alpha > 0).all())
    assert float(alpha[-1] / alpha[0]) > 3  # the wide channel is divided by more
    scale, zero = affine_parameters((x / alpha).amin(), (x / alpha).amax(), bits=4, scheme="asymmetric", signed=False)
    coded = fake_quantize(x / alpha, scale, zero.float(), 0, 15) @ (weight * alpha).t()  # 8-bit weights matter little
    assert float((coded - x @ weight.t()).square().mean()) < 0.7 * plain


def test_without_steps_nothing_is_scaled_and_never_for_the_worse() -> None:
    x, weight = uneven()
    alpha, loss, plain = distribution_scaling([(x, weight)], x.amin(0), x.amax(0), 8, 8, steps=0, rate=0.1)
    assert torch.equal(alpha, torch.ones(12))
    assert loss == plain
    for seed in range(3):
        torch.manual_seed(seed)
        even = torch.randn(200, 12)
        _, loss, plain = distribution_scaling([(even, weight)], even.amin(0), even.amax(0), 8, 8, steps=20, rate=0.5)
        assert loss <= plain


def multiplications(case: Problem) -> int:
    return sum(n.target == aten.mul.Tensor for n in case.graph.graph.nodes)


@pytest.mark.parametrize("multiply", [True, False])
def test_scaling_leaves_the_float_function_unchanged_and_says_what_it_costs(multiply: bool) -> None:
    case = problem("w4a4", steps=40, multiply=multiply)
    before, count = logits(case), multiplications(case)
    parameters = hyq(case)
    after = logits(case)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    # expand and project read SiLU outputs, through which no factor passes; the last convolution reads a GroupNorm
    stays = any("a multiplication that stays at run time" in note for note in parameters.notes)
    assert stays is multiply
    assert (multiplications(case) > count) is multiply


def test_depthwise_inputs_have_a_scale_per_channel_from_the_minimum_of_silu_up() -> None:
    case = problem("w8a8", steps=0)
    parameters = hyq(case)
    (quantizer,) = [q for q in parameters.activations.values() if q.axis is not None and q.kind == "uniform"]
    values = quantizer.dequantize(torch.zeros(1, 32, 1, 1, dtype=torch.int32)).flatten()
    step = parameters.uniform(next(v for v, q in parameters.activations.items() if q is quantizer)).scale
    assert bool(((values + 0.2784645).abs() <= step / 2 + 1e-6).all())
    on_runtime = hyq(problem("w8a8", steps=0, target="onnxruntime"))
    assert any("no kernel for scales per channel; 1 inputs of depthwise" in note for note in on_runtime.notes)


def test_softmax_has_four_bits_and_a_linear_exponential() -> None:
    parameters = hyq(problem("w8a8", scope="full", steps=0))
    (operator,) = [o for o in parameters.operators.values() if isinstance(o, IntegerSoftmax)]
    assert (operator.bits, operator.exponential) == (4, "linear")


@pytest.mark.parametrize("name", ["fqvit", "hyq"])
def test_simulation_of_all_integer_parts_is_close_to_float(name: str) -> None:
    options: dict[str, Any] = {"softmax_bits": 8} | ({"steps": 0} if name == "hyq" else {})
    case = problem("w8a8", scope="full", **options)
    parameters = METHODS[name](case)
    model = QuantizedModel(case.graph, case.sites, parameters, case.recipe, {}, False)
    images = next(case.pictures())
    with torch.no_grad():
        found, exact = model.simulation()(images), case.graph(images)
    assert float((found - exact).norm() / exact.norm()) < 0.1
