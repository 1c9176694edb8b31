"""The exported file in ONNX Runtime: that it runs in integers, computes what the simulation says, and is stored so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from qhyvit.errors import TargetError
from qhyvit.pipeline import export, quantize
from qhyvit.quantized import QuantizedModel
from qhyvit.recipe import Recipe
from qhyvit.targets import TARGETS, onnxruntime
from qhyvit.targets.onnxruntime import OrtSession, prepare
from quick import captured_once, ranges_only  # noqa: F401
from tiny import CLASSES, SIDE, Tiny, fresh

FLOAT_PRODUCTS = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "FusedGemm", "MatMulNBits"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def sqnr(reference: Tensor, value: Tensor) -> float:
    noise = float((reference.double() - value.double()).square().sum())
    return 10 * math.log10(float(reference.double().square().sum()) / noise) if noise else math.inf


def session(model: QuantizedModel, folder: Path, *, quantized: bool = True) -> OrtSession:
    return OrtSession(export(model, folder / "model.onnx", quantized=quantized), 1)


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in onnx.load(path).graph.initializer}


def weight(path: Path, node: str) -> tuple[int, NDArray[Any]]:
    """Stored type and codes of a layer's weight."""
    tensor = initializers(path)[f"{node}_weight"]
    return tensor.data_type, numpy_helper.to_array(tensor).astype(np.int32)


# What it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["partial", "full"])
@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a8", "w4a4"])
def test_the_runtime_computes_the_simulation_in_integers(bits: str, scope: str, tmp_path: Path) -> None:
    model = fresh(bits=bits, scope=scope)
    runtime = session(model, tmp_path)
    with torch.no_grad():
        simulated, deployed = model.simulation()(images()), runtime.run(images())
    assert deployed.shape == (64, CLASSES)
    assert sqnr(simulated, deployed) >= 30
    assert torch.equal(simulated.argmax(1), deployed.argmax(1))

    # A layer that fell back to float computes the same numbers, so the numbers alone would not show it.
    kinds = runtime.optimised_kinds()
    assert kinds["QLinearConv"] == 2
    assert kinds["QGemm"] == 2
    assert kinds["MatMulIntegerToFloat"] + kinds["QLinearMatMul"] == 2
    assert not FLOAT_PRODUCTS & set(kinds)
    if scope == "full":
        assert kinds["QLinearAdd"] == kinds["QLinearSoftmax"] == 1
    integer, floating = runtime.operators()
    assert integer == (8 if scope == "full" else 6)
    assert floating >= 1  # the mean over positions


@pytest.mark.parametrize(
    "changes",
    [
        {"activations": {"scheme": "symmetric"}},
        {"weights": {"granularity": "per-tensor"}},
        {"method": "minmax", "bias_correction": True},
        {"ranges": {"zero": "clamp"}},
        {"saturation": "unsigned"},
        {"saturation": "reduce-range"},
        {"bits": "w5a7", "overrides": [{"match": "head", "bits": "w8a8"}, {"match": "stem", "bits": "float"}]},
    ],
    ids=lambda c: next(iter(c)),
)
def test_other_recipes(changes: dict[str, Any], tmp_path: Path) -> None:
    model = quantize(Tiny(), calib=images(), input_size=SIDE, recipe=Recipe.model_validate(changes))
    runtime = session(model, tmp_path)
    with torch.no_grad():
        assert sqnr(model.simulation()(images()), runtime.run(images())) >= 30
    kinds = runtime.optimised_kinds()
    assert kinds["QLinearConv"] == (1 if "overrides" in changes else 2)
    assert kinds["QGemm"] == 2


class Attentive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(-1, -2) / 8, -1).flatten(1)


@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a4", "w2a3"])
def test_softmax_in_integers_gives_the_simulations_codes(bits: str, tmp_path: Path) -> None:
    """The kernel rounds 1 / scale down, so a scale that it cannot express would move codes everywhere."""
    model = quantize(Attentive(), calib=images(), input_size=SIDE, bits=bits, scope="full", method="mse")
    runtime = session(model, tmp_path)
    assert runtime.optimised_kinds()["QLinearSoftmax"] == 1
    scale = next(q.scale for name, q in model.parameters.activations.items() if "softmax" in name)
    assert np.floor(np.float32(1) / scale.numpy()) == (1 / scale.double()).round()
    with torch.no_grad():
        simulated, deployed = model.simulation()(images()), runtime.run(images())
    assert (simulated - deployed).abs().max() < 1.5 * scale
    assert ((simulated - deployed).abs() > 0.5 * scale).float().mean() < 1e-3


def test_softmax_scales_are_left_alone_where_softmax_runs_in_float() -> None:
    partial, simulated = fresh(bits="w4a4"), fresh(bits="w4a4", target="simulate")
    (name,) = (n for n in partial.parameters.activations if "softmax" in n)
    assert torch.equal(partial.parameters.activations[name].scale, simulated.parameters.activations[name].scale)


def test_the_float_model(tmp_path: Path) -> None:
    model = fresh()
    runtime = session(model, tmp_path, quantized=False)
    with torch.no_grad():
        torch.testing.assert_close(runtime.run(images()), model.graph(images()), rtol=1e-4, atol=1e-5)
    assert runtime.operators()[0] == 0


@pytest.mark.parametrize("count", [1, 3, 64])
def test_any_batch_size(count: int, tmp_path: Path) -> None:
    runtime = session(fresh(), tmp_path)
    torch.testing.assert_close(runtime.run(images()[:count]), runtime.run(images())[:count], rtol=0, atol=1e-5)


# How it is stored -------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Large enough that weights are most of the file."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.head = nn.Linear(3 * SIDE * SIDE, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flatten(1))
        return out


def head(**changes: Any) -> QuantizedModel:
    return quantize(Head(), calib=images(), input_size=SIDE, **ranges_only(changes))


@pytest.mark.parametrize("saturation", ["ignore", "unsigned"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_four_bit_weights_are_packed_and_still_run_in_integers(bits: int, saturation: str, tmp_path: Path) -> None:
    model = head(bits=f"w{bits}a8", saturation=saturation)
    runtime = session(model, tmp_path)
    (node,) = model.parameters.weights
    tensor = initializers(runtime.path)[f"{node}_weight"]
    assert tensor.data_type == TensorProto.INT4
    codes = weight(runtime.path, node)[1]
    assert (codes == model.codes(node).t().numpy()).all()
    assert abs(codes).max() <= 2 ** (bits - 1)
    assert runtime.path.stat().st_size < 64 * 768 / 2 + 4000
    kinds = runtime.optimised_kinds()
    assert kinds["QGemm"] == 1
    assert not FLOAT_PRODUCTS & set(kinds)
    assert "Cast" not in kinds  # folded when loaded, not run for every picture
    with torch.no_grad():
        torch.testing.assert_close(runtime.run(images()), model.simulation()(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", ["w8a8", "w6a6"])
def test_eight_bit_weights_take_a_byte_each(bits: str, tmp_path: Path) -> None:
    model = head(bits=bits, saturation="ignore")
    path = export(model, tmp_path / "m.onnx")
    (node,) = model.parameters.weights
    kind, codes = weight(path, node)
    assert kind == TensorProto.INT8
    assert (codes == model.codes(node).t().numpy()).all()
    assert path.stat().st_size < 64 * 768 + 4000


def test_biases_are_32_bit_integers(tmp_path: Path) -> None:
    model = head()
    (node,) = model.parameters.weights
    stored = initializers(export(model, tmp_path / "m.onnx"))[f"{node}_bias"]
    bias, scale = model.bias(node), model.bias_scale(node)
    assert stored.data_type == TensorProto.INT32
    assert bias is not None
    assert scale is not None
    assert np.abs(numpy_helper.to_array(stored) - (bias / scale).numpy()).max() <= 0.51


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for scope in ("partial", "full"):
        model = fresh(scope=scope)
        first = export(model, tmp_path / "first.onnx").read_bytes()
        assert export(model, tmp_path / "again.onnx").read_bytes() == first
        assert export(fresh(scope=scope), tmp_path / "anew.onnx").read_bytes() == first
    assert str(tmp_path).encode() not in first


# Saturation -------------------------------------------------------------------------------------------------------


def test_unsigned_weights_are_the_same_codes_shifted(tmp_path: Path) -> None:
    signed, unsigned = fresh(saturation="ignore"), fresh(saturation="unsigned")
    runtimes = [OrtSession(export(m, tmp_path / f"{m.recipe.saturation}.onnx"), 1) for m in (signed, unsigned)]
    for site in signed.sites.weights:
        (kind, codes), (other_kind, other) = (weight(r.path, site.node) for r in runtimes)
        assert (kind, other_kind) == (TensorProto.INT8, TensorProto.UINT8)
        assert (other - 128 == codes).all()
        assert torch.equal(signed.codes(site.node), unsigned.codes(site.node))
    assert runtimes[0].operators() == runtimes[1].operators()
    with torch.no_grad():
        assert torch.equal(signed.simulation()(images()), unsigned.simulation()(images()))
        assert sqnr(unsigned.simulation()(images()), runtimes[1].run(images())) >= 30


def test_reduced_range_keeps_sums_of_two_products_within_16_bits(tmp_path: Path) -> None:
    model = fresh(saturation="reduce-range", overrides=[{"match": "head", "bits": "w4a8"}])
    path = export(model, tmp_path / "m.onnx")
    for site in model.sites.weights:
        _, codes = weight(path, site.node)
        assert codes.min() >= -64
        assert codes.max() <= 63
        assert codes.max() > 31 or site.module == "head"
        assert 2 * 255 * abs(codes).max() < 2**15
    assert model.parameters.weights[model.sites.weights[-1].node].bits == 4  # narrow ones lose nothing


@pytest.mark.parametrize(("saturating", "expected"), [(True, "unsigned"), (False, "ignore")])
def test_auto_asks_the_processor(saturating: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "saturates", lambda: saturating)
    assert prepare(Recipe()).saturation == expected
    assert fresh().recipe.saturation == expected
    for asked in ("unsigned", "reduce-range", "ignore"):
        assert prepare(Recipe(saturation=asked)).saturation == asked  # type: ignore[arg-type]


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"bits": "w16a8"}, "16-bit weights"),
        ({"bits": "w8a16"}, "16-bit activations"),
        ({"bits": "w8a32"}, "weights quantized alone"),
        ({"bits": "w32a8"}, "activations quantized alone"),
        ({"weights": {"scheme": "asymmetric"}}, "asymmetric weights"),
        ({"activations": {"granularity": "per-channel"}}, "per-channel activation scales"),
    ],
)
def test_what_it_has_no_kernels_for_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=f"onnxruntime has no integer kernel for {message}.*target simulate"):
        quantize(Tiny(), calib=images(), input_size=SIDE, recipe=Recipe.model_validate(recipe))


def test_the_refused_layer_is_named() -> None:
    with pytest.raises(TargetError, match="16-bit activations, asked for in layer qkv;"):
        fresh(overrides=[{"match": "qkv", "bits": "w8a16"}])


def test_a_model_for_another_target_is_checked_on_export(tmp_path: Path) -> None:
    model = fresh(target="simulate", bits="w16a16")
    with pytest.raises(TargetError, match="16-bit weights"):
        export(model, tmp_path / "m.onnx", target="onnxruntime")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"<html>"])
def test_a_damaged_file(damage: Any, tmp_path: Path) -> None:
    path = export(fresh(), tmp_path / "model.onnx")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TargetError, match=r"cannot load .*model\.onnx: ") as caught:
        OrtSession(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"cannot load .*nothing\.onnx"):
        OrtSession(tmp_path / "nothing.onnx")


def test_an_export_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    path = export(model, tmp_path / "model.onnx")
    before = path.read_bytes()

    def full_disk(proto: onnx.ModelProto, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full_disk)
    with pytest.raises(TargetError, match=r"model\.onnx cannot be written: No space left"):
        export(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_is_registered() -> None:
    target = TARGETS["onnxruntime"]
    assert target.file_name == "model.onnx"
    assert target.load is OrtSession
