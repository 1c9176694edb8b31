"""Other quantizers in a comparison: the same net and pictures, scored as their own runtime runs them."""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import qhyvit
from hybrid import Hybrid
from qhyvit import cli
from qhyvit.comparison import Comparison, Variant, peers
from qhyvit.comparison.peers import PEERS, write_float
from qhyvit.comparison.subjects import captured
from qhyvit.data.dataset import open_dataset
from qhyvit.data.preprocessing import Preprocessing
from qhyvit.errors import QhyvitError
from qhyvit.models.load import LoadedModel, load_model, stressed
from qhyvit.recipe import Recipe
from qhyvit.targets import TARGETS
from tiny import CLASSES, SIDE, Tiny, calibration, pictures

ORT, NNCF = "ort-quantize-static", "nncf-ptq"
needs_nncf = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in PEERS[NNCF].packages),
    reason="needs nncf and openvino: pip install qhyvit[peers]",
)
each_peer = pytest.mark.parametrize("peer", [ORT, pytest.param(NNCF, marks=needs_nncf)])
LEAST = {ORT: 20, NNCF: 5}  # dB; without VNNI OpenVINO's sums saturate, 9 dB were seen


@cache
def tiny() -> LoadedModel:
    """The tiny net, captured once for all tests."""
    return captured(load_model(Tiny(), input_size=SIDE))


def images(path: Path, count: int, seed: int | None = None) -> torch.Tensor:
    """Pictures preprocessed for the tiny net; a draw of them, or all in order."""
    data = open_dataset(path, "evaluation")
    data = data if seed is None else data.shuffled(seed)
    return torch.cat([b.images for b in data.batches(Preprocessing.from_config(tiny().preprocessing_config), 8, count)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pictures(tmp_path / "data.npz", labels=True)


@pytest.fixture
def compare(data: Path, tmp_path: Path) -> Callable[..., Comparison]:
    def call(*methods: Any, **changes: Any) -> Comparison:
        given = {"bits": ("w8a8",), "seeds": 1, "calib": calibration(), "data": data, "calibration": {"size": 6}}
        return qhyvit.compare(tiny(), methods=methods, cache=tmp_path / "cells", **(given | changes))

    return call


def runs_integers(file: Path) -> bool:
    """Whether a float tensor is made into codes somewhere in a peer's file."""
    return "QuantizeLinear" in (found := file.read_text(errors="ignore")) or "FakeQuantize" in found


@each_peer
def test_a_cell_is_what_the_peer_s_file_gives_on_the_same_pictures(
    peer: str, compare: Callable[..., Comparison], data: Path, tmp_path: Path
) -> None:
    found = compare(peer, "minmax", seeds=(3,))
    assert not found.failed
    outcome, ours = found.outcomes.values()
    drawn = images(calibration(), 6, seed=3).numpy()
    saturation = TARGETS["onnxruntime"].prepare(Recipe()).saturation
    written = PEERS[peer].prepare(tiny().module, drawn, tmp_path / "alone", saturation)()  # type: ignore[arg-type]
    assert runs_integers(written.file)
    run, x = PEERS[peer].open(written.file, 1), images(data, 24)
    with torch.no_grad():
        logits, labels = tiny().module(x), torch.arange(24) % CLASSES
    got = run(x).double()
    assert torch.equal(run(x[2:4]).double(), got[2:4])
    assert outcome.top1 == float((got.argmax(1) == labels).double().mean())
    assert outcome.agreement == float((got.argmax(1) == logits.argmax(1)).double().mean())
    noise = float((got - logits).square().sum())
    assert outcome.sqnr_db == pytest.approx(10 * math.log10(float(logits.double().square().sum()) / noise), rel=1e-3)
    assert outcome.sqnr_db is not None
    assert LEAST[peer] < outcome.sqnr_db < 60  # 8 bits: neither broken nor float
    assert outcome.seconds is not None
    assert outcome.notes == (written.note,)
    assert ours.float_top1 == outcome.float_top1


@pytest.mark.parametrize("stress", [None, "both:10"])
def test_the_float_file_is_the_net_for_any_batch(stress: str | None, tmp_path: Path) -> None:
    model = captured(load_model(Hybrid(), input_size=SIDE))
    model = stressed(model, stress) if stress else model
    file = write_float(model.module, tmp_path / "float.onnx")  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count))
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = model.module(x)
        assert torch.allclose(torch.from_numpy(got), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("saturation", "kind", "zero", "largest"),
    [("ignore", "int8", 0, 127), ("reduce-range", "int8", 0, 64), ("unsigned", "uint8", 128, 128)],
)
def test_onnx_runtime_stores_weights_as_the_processor_needs(
    saturation: str, kind: str, zero: int, largest: int, tmp_path: Path
) -> None:
    drawn = images(calibration(), 4).numpy()
    run = PEERS[ORT].prepare(tiny().module, drawn, tmp_path, saturation)  # type: ignore[arg-type]
    graph = onnx.load(run().file).graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    codes = {n.output[0]: n.input for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in tensors}
    layers = [codes[n.input[1]] for n in graph.node if n.op_type in {"Conv", "Gemm", "MatMul"} and n.input[1] in codes]
    assert len(layers) == 4  # two convolutions, two linear layers
    for weight, scale, zero_point in ([tensors[name] for name in layer] for layer in layers):
        assert weight.dtype == zero_point.dtype == kind
        assert scale.size > 1  # per channel
        assert set(zero_point.ravel()) == {zero}
        assert largest - 1 <= np.abs(weight.astype(int) - zero).max() <= largest


def test_peers_only_know_8_bits_and_say_so(compare: Callable[..., Comparison]) -> None:
    found = compare("minmax", ORT, bits=("w8a8", "w4a4", "w8a6"))
    assert not found.failed
    rows = {(r.axes["method"], r.axes["bits"]): r for r in found.rows}
    for bits in ("w4a4", "w8a6"):
        row = rows[ORT, bits]
        assert row.seeds == 0
        assert set(row.mean.values()) == {None}
        assert row.notes == ("not run: peers only know 8 bits.",)
        assert rows["minmax", bits].seeds == 1
    assert rows[ORT, "w8a8"].seeds == 1
    number = found.to_markdown().partition(". not run: peers only know 8 bits.")[0][-1]
    assert f"| w4a4 | {ORT} | 0 | - | - | - | - | - | {number} |" in found.to_markdown()
    assert found.reused == 0
    assert compare(ORT, bits=("w8a8", "w4a4")).reused == 1  # a cell that was never run is not there already


def test_scopes_do_not_reach_a_peer(
    compare: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    prepare = peers.Peer.prepare
    monkeypatch.setattr(peers.Peer, "prepare", lambda *given: calls.append(given) or prepare(*given))
    partial, full = compare(ORT, scopes=("partial", "full")).outcomes.values()
    assert partial == full
    assert len(calls) == 1
    assert compare(ORT, scopes=("full",), target="simulate").reused == 1
    assert compare(ORT, saturation="reduce-range").reused == 0


def test_a_peer_that_fails_fails_alone(compare: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("No such operator.\nA long trace.")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fail)
    found = compare("minmax", ORT)
    assert list(found.failed.values()) == [f"{ORT} cannot quantize this net: No such operator."]
    assert logging.root.manager.disable == 0


def test_what_is_not_installed_is_said_in_one_sentence_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    monkeypatch.setattr("qhyvit.comparison.run.load_model", None)  # not called
    sentence = f"{NNCF} needs nncf and openvino, not installed here: pip install qhyvit[peers]."
    monkeypatch.setattr(sys, "argv", ["qhyvit", "compare", "--peers", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    shown, said = capsys.readouterr()
    assert (shown, said) == ("", f"qhyvit: {sentence}\n")
    assert not (tmp_path / "out").exists()


def test_peers_are_added_to_the_methods(monkeypatch: pytest.MonkeyPatch, compare: Callable[..., Comparison]) -> None:
    monkeypatch.setattr(peers.Peer, "check", lambda _: None)
    found = compare("minmax", peers=True, bits=("w4a4",))
    assert [cell.method for cell in found.outcomes] == ["minmax", NNCF, ORT]


@pytest.mark.parametrize(
    "method", [f"{ORT}:per_channel=false", Variant("mine", ORT, changes={"bias_correction": True})]
)
def test_peers_take_no_options(compare: Callable[..., Comparison], method: Any) -> None:
    with pytest.raises(QhyvitError, match="is another quantizer and has no options"):
        compare(method)


@each_peer
def test_peers_keep_quiet(peer: str, compare: Callable[..., Comparison], capfd: pytest.CaptureFixture[str]) -> None:
    compare(peer)
    assert capfd.readouterr().out == ""
