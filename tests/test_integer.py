"""Products of codes: against whole numbers counted by hand, and against what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from qhyvit.graph.ops import aten
from qhyvit.integer import IntegerProduct
from qhyvit.pipeline import export, quantize
from qhyvit.quantized import QuantizedModel
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.targets.onnxruntime import OrtSession
from quick import ranges_only


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def quantizer(scale: float, zero_point: int, bits: int = 8) -> UniformAffine:
    return UniformAffine(
        torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), bits=bits, signed=False, scheme="asymmetric"
    )


def linear_product(output: UniformAffine | None) -> IntegerProduct:
    """Codes (5, 15) after the zero point give -18 and 74 with these weights and biases."""
    weight, bias = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([7.0, -1.0])
    return IntegerProduct(
        aten.linear.default, (bias,), quantizer(0.5, 5), None, weight, torch.tensor([0.25, 0.5]), 1, output
    )


X = torch.tensor([[2.5, 7.5]])  # codes 10 and 20 at scale 0.5, zero point 5


def test_a_linear_by_hand() -> None:
    assert linear_product(None)(X).tolist() == [[-18 * 0.25, 74 * 0.5]]


def test_requantization_by_hand() -> None:
    product = linear_product(quantizer(2.0, 3, bits=4))
    assert product.requantizes
    # -18·0.25/2 = -2.25 → -2; 74·0.5/2 = 18.5 → 18, beyond the largest of 16 codes: 15 - 3
    assert product(X).tolist() == [[-2 * 2.0, 12 * 2.0]]


def test_ties_go_to_the_even_code() -> None:
    one = IntegerProduct(
        aten.linear.default, (None,), quantizer(1.0, 0), None, torch.ones(1, 1), torch.tensor(0.5), 1, quantizer(1.0, 0)
    )
    assert one(torch.tensor([[1.0], [3.0], [5.0], [7.0]])).flatten().tolist() == [0, 2, 2, 4]


def test_a_matmul_by_hand() -> None:
    left, right = quantizer(0.5, 3), quantizer(0.25, 7)
    product = IntegerProduct(aten.matmul.default, (), left, right, None, left.scale * right.scale, 0, None)
    a, b = torch.tensor([[2.0, -3.0], [1.0, 4.0]]), torch.tensor([[5.0, 0.0], [-2.0, 6.0]])
    found = product(a * 0.5, b * 0.25)
    assert found.tolist() == [[16 * 0.125, -18 * 0.125], [-3 * 0.125, 24 * 0.125]]


def test_the_layers_own_buffers_are_not_changed_by_running() -> None:
    product = linear_product(quantizer(2.0, 3))
    before = {name: value.clone() for name, value in product.state_dict().items()}
    product(X)
    assert all(torch.equal(value, before[name]) for name, value in product.state_dict().items())


def int64_convolution(x: NDArray[np.int64], w: NDArray[np.int64], stride: int, padding: int, groups: int) -> Tensor:
    """A convolution (n, c, h, w) in whole numbers, by its definition."""
    size = w.shape[-1]
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
    n, c, height, width = windows.shape[:4]
    windows = windows.reshape(n, groups, c // groups, height, width, size, size)
    w = w.reshape(groups, -1, c // groups, size, size)
    return torch.from_numpy(np.einsum("ngchwij,gocij->ngohw", windows, w).reshape(n, -1, height, width))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2, 4]),
    requantized=st.booleans(),
)
def test_convolutions_equal_whole_number_arithmetic(
    seed: int, stride: int, padding: int, groups: int, requantized: bool
) -> None:
    rng = np.random.default_rng(seed)
    zero = int(rng.integers(0, 256))
    codes = rng.integers(0, 256, (2, 4, 6, 7))
    weight = rng.integers(-128, 128, (8, 4 // groups, 3, 3))
    bias = rng.integers(-5000, 5000, 8)
    scale = torch.from_numpy(rng.uniform(1e-5, 1e-3, 8)).float()
    output = quantizer(0.037, 101) if requantized else None
    rest = (torch.from_numpy(bias).float(), [stride] * 2, [padding] * 2, [1, 1], groups)
    x = quantizer(0.03, zero)
    product = IntegerProduct(
        aten.conv2d.default, rest, x, None, torch.from_numpy(weight).float(), scale.float(), 1, output
    )
    found = product(x.dequantize(torch.from_numpy(codes).int()))

    # numbers are padded with zero, which is the code `zero`
    total = int64_convolution(codes - zero, weight, stride, padding, groups) + torch.from_numpy(bias).view(-1, 1, 1)
    if output is None:
        assert torch.equal(found, total.float() * scale.view(-1, 1, 1))
    else:
        factor = (scale / output.scale).view(-1, 1, 1)
        expected = (torch.round(total.float() * factor) + 101).clamp(0, 255)
        assert torch.equal(output.quantize(found), expected.int())


# Against the runtime ----------------------------------------------------------------------------------------------

SIDE = 8


class Conv(nn.Module):
    def __init__(self, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.widen = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 16, 3, stride, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.widen(x)).flatten(1)
        return out


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIDE, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.transpose(1, 2).flatten(2)).flatten(1)
        return out


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(-1, -2)).flatten(1)


def images(count: int, seed: int) -> Tensor:
    """Some lie outside of the range that was calibrated, so that codes saturate too."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * (1 + seed)


def only(build: Callable[[], nn.Module], tmp_path: Path, **changes: Any) -> tuple[QuantizedModel, OrtSession]:
    torch.manual_seed(5)
    model = quantize(build(), calib=images(16, 0), input_size=SIDE, **ranges_only(changes))
    return model, OrtSession(export(model, tmp_path / "model.onnx"), 1)


def output_codes(model: QuantizedModel, logits: Tensor) -> Tensor:
    """Codes of the last site, through the reshape behind it."""
    last = model.parameters.activations[model.sites.activations[-1].value]
    found = logits / last.scale + last.zero_point
    codes = found.round()
    assert (found - codes).abs().max() < 1e-3  # they are codes and nothing between
    return codes.int()


@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a4"])
@pytest.mark.parametrize(
    ("kind", "build", "scope"),
    [
        ("QLinearConv", Conv, "partial"),
        ("QLinearConv", partial(Conv, stride=2, groups=8), "partial"),
        ("QGemm", Linear, "full"),
        ("QLinearMatMul", Product, "full"),
    ],
    ids=["conv", "depthwise", "linear", "matmul"],
)
def test_codes_are_those_of_the_runtime(
    kind: str, build: Callable[[], nn.Module], scope: str, bits: str, tmp_path: Path
) -> None:
    model, runtime = only(build, tmp_path, scope=scope, bits=bits, saturation="unsigned")  # exact on every processor
    kinds = runtime.optimised_kinds()
    assert kinds[kind] == (2 if kind == "QLinearConv" else 1)
    assert not set(kinds) & {"Conv", "Gemm", "MatMul"}
    with torch.no_grad():
        for x in (images(32, 1), images(32, 2)):
            simulated = output_codes(model, model.simulation()(x))
            assert torch.equal(simulated, output_codes(model, runtime.run(x)))
            assert len(np.unique(simulated)) >= 0.8 * 2 ** int(bits[-1])  # the range is in use


@pytest.mark.parametrize(("kind", "build"), [("QGemm", Linear), ("MatMulIntegerToFloat", Product)])
def test_float_outputs_are_those_of_the_runtime(kind: str, build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, runtime = only(build, tmp_path, saturation="unsigned")
    assert runtime.optimised_kinds()[kind] == 1
    x = images(32, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.simulation()(x), runtime.run(x), rtol=1e-6, atol=0)
