"""LayerNorm in integers against the float norm."""

from __future__ import annotations

import json

import pytest
import torch

from qhyvit.operators import OPERATORS, IntegerLayerNorm
from qhyvit.quantizers.power_of_two import PowerOfTwoFactor


def test_within_one_step_of_the_float_norm() -> None:
    torch.manual_seed(0)
    spread = torch.exp2(torch.randint(-3, 1, (64,)).float())
    x = torch.randn(200, 64) * spread
    quantizer = PowerOfTwoFactor.fitted(x, x.min(), x.max(), bits=8, axis=-1)
    assert len(quantizer.exponents.unique()) > 1
    weight, bias = torch.rand(64) + 0.5, torch.randn(64) * 0.1
    norm = torch.nn.functional.layer_norm(quantizer(x), (64,), weight, bias, 1e-5)
    step = norm.abs().max() / 127
    operator = IntegerLayerNorm(quantizer.base_scale, weight, bias, step, eps=1e-5)
    found = operator(quantizer(x))
    assert float((found / step - torch.round(found / step)).abs().max()) < 1e-4
    assert float((found - norm).abs().max()) <= 1.5 * float(step)  # half a step more, as the norm is not rounded
    assert float((found - norm).abs().mean()) < 0.4 * float(step)


@pytest.mark.parametrize("sign", [1, -1])
def test_negative_weights_and_rows_of_zeros(sign: int) -> None:
    weight, bias = sign * torch.ones(4), torch.tensor([0.5, 0, -0.5, 1])
    operator = IntegerLayerNorm(torch.tensor(0.1), weight, bias, torch.tensor(0.25), eps=1e-5)
    assert operator(torch.zeros(2, 4)).tolist() == [[0.5, 0, -0.5, 1]] * 2
    row = operator(torch.tensor([[1.0, 1.0, 3.0, 3.0]]))
    assert torch.allclose(row, torch.tensor([[-1.0, -1, 1, 1]]) * sign + bias, atol=0.25)


def test_it_comes_back_from_its_specification() -> None:
    weight, bias = torch.rand(4), torch.rand(4)
    operator = IntegerLayerNorm(torch.tensor(0.1), weight, bias, torch.tensor(0.02), eps=1e-6)
    spec = json.loads(json.dumps(operator.spec()))
    again = OPERATORS[spec["kind"]].from_spec(spec, **operator.state_dict())
    x = torch.round(torch.randn(3, 4) / 0.1) * 0.1
    assert torch.equal(again(x), operator(x))
