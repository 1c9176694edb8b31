"""minmax, percentile, mse and kl on a small net: what they choose, and what a recipe changes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qhyvit.errors import QhyvitError, RecipeError
from qhyvit.graph.ops import weight_of
from qhyvit.methods import METHODS
from qhyvit.pipeline import export, quantize
from qhyvit.quantized import QuantizedModel
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.recipe import Recipe
from qhyvit.targets.onnxruntime import OrtSession
from quick import captured_once  # noqa: F401
from tiny import CLASSES, SIDE, Tiny, fresh

NAMES = ("minmax", "percentile", "mse", "kl")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def tiny(recipe: Recipe | None = None, **changes: Any) -> QuantizedModel:
    return quantize(Tiny(), calib=images(), input_size=SIDE, recipe=recipe, **changes)


def sqnr(model: QuantizedModel) -> float:
    with torch.no_grad():
        exact, simulated = model.graph(images()).double(), model.simulation()(images()).double()
    noise = float((exact - simulated).square().sum())
    return 10 * math.log10(float(exact.square().sum()) / noise) if noise else math.inf


def quantizers(model: QuantizedModel) -> dict[str, UniformAffine]:
    p = model.parameters
    return {f"weight {n}": q for n, q in p.weights.items()} | {f"activation {n}": q for n, q in p.activations.items()}


def settings_of(model: QuantizedModel) -> dict[str, tuple[Any, ...]]:
    return {n: (q.spec(), q.scale.tolist(), q.zero_point.tolist()) for n, q in quantizers(model).items()}


# What is chosen ---------------------------------------------------------------------------------------------------


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIDE * SIDE, 2)
        with torch.no_grad():
            self.linear.weight.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(2))
            self.linear.weight[0, 3], self.linear.weight[1, 5] = -2.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.flatten(1))
        return out


def one_linear(images: Tensor, **changes: Any) -> tuple[UniformAffine, UniformAffine]:
    """Quantizers of the input and of the weight."""
    model = quantize(OneLinear(), calib=images, input_size=SIDE, **changes)
    (activation,), (weight,) = model.parameters.activations.values(), model.parameters.weights.values()
    return activation, weight


def extremes(low: float, high: float) -> Tensor:
    x = images(8).clamp(-1, 1)
    x[0, 0, 0, 0], x[5, 2, 7, 7] = low, high  # in different pictures
    return x


def test_minmax_takes_the_extremes() -> None:
    activation, weight = one_linear(extremes(-3.0, 7.2), method="minmax", target="simulate", calibration={"batch": 3})
    assert activation.scale.item() == pytest.approx(10.2 / 255)
    assert activation.zero_point.item() == 75  # 3 / 0.04
    assert weight.scale.tolist() == pytest.approx([2 * 2.0 / 255, 2 * 1.0 / 255])
    assert weight.zero_point.tolist() == [0, 0]


def test_minmax_symmetric_and_per_tensor() -> None:
    recipe = Recipe.model_validate(
        {
            "method": "minmax",
            "bits": "w4a6",
            "weights": {"granularity": "per-tensor", "scheme": "asymmetric"},
            "activations": {"scheme": "symmetric"},
            "target": "simulate",
        }
    )
    activation, weight = one_linear(extremes(-3.0, 6.2), recipe=recipe)
    assert activation.zero_point.item() == 32
    assert activation.scale.item() == pytest.approx(2 * 6.2 / 63)
    assert weight.scale.shape == ()
    assert weight.scale.item() == pytest.approx(3.0 / 15)
    assert weight.zero_point.item() == 2  # of -8 … 7: -2.0 becomes -8


def test_minmax_per_channel_activations() -> None:
    x = images(8).clamp(-1, 1)
    x[:, 1] *= 10
    model = quantize(
        Tiny(),
        calib=x,
        input_size=SIDE,
        method="minmax",
        target="simulate",
        activations={"granularity": "per-channel", "scheme": "asymmetric"},
    )
    scale = model.parameters.activations["pictures"].scale
    assert scale.tolist() == pytest.approx([2 / 255, 20 / 255, 2 / 255])


def test_percentile_leaves_the_outlier_out() -> None:
    x = extremes(-1.0, 100.0)
    wide, _ = one_linear(x, method="minmax")
    narrow, _ = one_linear(x, method="percentile", ranges={"percentile": 99.0})
    assert wide.scale.item() == pytest.approx(101 / 255)
    assert narrow.scale.item() == pytest.approx(2 / 255, rel=0.05)  # a bin is 1/16 wide


def test_mse_and_kl_clip_what_minmax_does_not() -> None:
    x = extremes(-1.0, 10.0)
    for method in ("mse", "kl"):
        activation, _ = one_linear(x, method=method, bits="w3a3")
        assert activation.scale.item() < 0.5 * 11 / 7, method


@pytest.mark.parametrize("bits", ["w3a8", "w4a8", "w8a8"])
def test_mse_is_never_worse_than_minmax_on_a_weight(bits: str) -> None:
    best, wide = tiny(bits=bits, method="mse"), tiny(bits=bits, method="minmax")
    for node in best.parameters.weights:
        found = weight_of(best.graph, best.nodes[node])
        assert found is not None
        errors = [(q.parameters.weights[node](found[0]) - found[0]).square().mean() for q in (best, wide)]
        assert errors[0] <= errors[1] * (1 + 1e-6)


# Everything runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("bits", "least"), [("w16a16", 36), ("w8a8", 28), ("w6a6", 18), ("w4a8", 14), ("w4a4", 5)], ids=lambda v: str(v)
)
def test_every_method_at_every_width(name: str, bits: str, least: float) -> None:
    model = tiny(method=name, bits=bits, target="simulate" if bits == "w16a16" else "onnxruntime")
    assert model.recipe.method == name
    weight_bits, activation_bits = (int(n) for n in bits[1:].split("a"))
    assert {q.bits for q in model.parameters.weights.values()} == {weight_bits}
    for site in model.sites.activations:  # what only the runtime wants as codes has 8 bits at least
        wanted = max(8, activation_bits) if site.role == "output" else activation_bits
        assert model.parameters.activations[site.value].bits == wanted, site.value
    for node in model.parameters.weights:
        assert model.codes(node).abs().max() <= 2 ** (weight_bits - 1)
    assert least < sqnr(model) < 120


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["partial", "full"])
@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_every_method_in_every_scheme(name: str, scope: str, granularity: str, scheme: str) -> None:
    both = {"granularity": granularity, "scheme": scheme}
    recipe = Recipe.model_validate(
        {"method": name, "scope": scope, "weights": both, "activations": both, "target": "simulate"}
    )
    model = tiny(recipe)
    expected = 0 if granularity == "per-channel" else None
    for quantizer in model.parameters.weights.values():
        assert quantizer.signed
        assert quantizer.axis == expected
        if scheme == "symmetric":
            assert not quantizer.zero_point.any()
    for quantizer in model.parameters.activations.values():
        assert not quantizer.signed
        assert (quantizer.axis is None) == (granularity == "per-tensor")
        if scheme == "symmetric":
            assert (quantizer.zero_point == 128).all()
    assert sqnr(model) > 18


def test_more_bits_never_lower_the_sqnr() -> None:
    found = [sqnr(tiny(bits=f"w{b}a{b}", method="mse", target="simulate")) for b in (2, 3, 4, 5, 6, 7, 8)]
    assert found == sorted(found)
    assert found[-1] - found[1] > 20  # 5 bits are worth 30 dB


# Overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_override_changes_its_layer_only(name: str) -> None:
    plain = settings_of(tiny(method=name))
    model = tiny(
        method=name,
        overrides=[{"match": "qk*", "bits": "w4a5", "weights": {"granularity": "per-tensor"}}],
    )
    changed = {n for n, value in settings_of(model).items() if value != plain[n]}
    (weight,) = (s.node for s in model.sites.weights if s.module == "qkv")
    (activation,) = (s.value for s in model.sites.activations if s.module == "qkv")
    assert changed == {f"weight {weight}", f"activation {activation}"}
    assert model.parameters.weights[weight].bits == 4
    assert model.parameters.weights[weight].scale.shape == ()
    assert model.parameters.activations[activation].bits == 5


def test_of_two_overrides_the_last_wins() -> None:
    model = tiny(overrides=[{"match": "*", "bits": "w4a4"}, {"match": "head", "bits": "w6a7"}])
    bits = {s.module: model.parameters.weights[s.node].bits for s in model.sites.weights}
    assert bits == {"stem": 4, "depthwise": 4, "qkv": 4, "head": 6}


@pytest.mark.parametrize("bits", ["float", "w32a32"])
def test_a_float_override_leaves_its_layer_alone(bits: str, tmp_path: Path) -> None:
    model = tiny(bits="w4a4", overrides=[{"match": "head", "bits": bits}])
    assert "head" not in model.sites.modules()
    kinds = OrtSession(export(model, tmp_path / "model.onnx"), 1).optimised_kinds()
    assert (kinds["QLinearConv"], kinds["QGemm"], kinds["Gemm"]) == (2, 1, 1)
    everything_else = tiny(bits="w4a4", overrides=[{"match": "[!h]*", "bits": "float"}])
    assert {s.module for s in everything_else.sites.weights} == {"head"}


def test_all_float_is_the_float_model(tmp_path: Path) -> None:
    model = tiny(overrides=[{"match": "*", "bits": "float"}])
    assert not model.sites.modules()
    with torch.no_grad():
        assert torch.equal(model.simulation()(images()), model.graph(images()))
    runtime = OrtSession(export(model, tmp_path / "model.onnx"), 1)
    assert runtime.operators()[0] == 0
    assert runtime.run(images()).shape == (32, CLASSES)


# What is refused --------------------------------------------------------------------------------------------------


def test_a_method_nobody_knows() -> None:
    with pytest.raises(QhyvitError, match=r"'mes'.*Did you mean 'mse'\?.*kl, .*minmax"):
        fresh(method="mes")


def test_a_target_nobody_knows() -> None:
    with pytest.raises(QhyvitError, match=r"'onxruntime'.*Did you mean 'onnxruntime'\?"):
        fresh(target="onxruntime")


def test_an_override_that_matches_nothing() -> None:
    with pytest.raises(RecipeError, match=r"overrides.*'hed'.*matches no layer; layers are called like '\w+'"):
        fresh(overrides=[{"match": "hed", "bits": "w4a4"}])


def test_every_method_says_what_it_does() -> None:
    for name, method in METHODS.items():
        assert len(method.description) > 20, name
