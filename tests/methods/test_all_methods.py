"""What holds for every method: it covers all sites, says what it replaced, and a runtime computes what is simulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid import SIDE, Hybrid, problem
from qhyvit.errors import TargetError
from qhyvit.methods import METHODS
from qhyvit.pipeline import export, quantize
from qhyvit.quantized import QuantizedModel
from qhyvit.store import load, save
from qhyvit.verification import verify
from tiny import Tiny, calibration

PUBLISHED: dict[str, dict[str, Any]] = {
    "adalog": {"candidates": 16, "keep": 2, "steps": 2, "rounds": 1},
    "easyquant": {"candidates": 20, "rounds": 1},
    "ptq4vit": {"candidates": 20, "rounds": 1},
    "fqvit": {},
    "hyq": {"steps": 30},
    "iasvit": {"iterations": 5, "batch": 4, "softmax": "sulq"},
    "repqvit": {},
}


def quantized(method: str, net: type[torch.nn.Module] = Hybrid, **changes: Any) -> QuantizedModel:
    return quantize(net(), calib=calibration(), input_size=SIDE, method=method, options=PUBLISHED[method], **changes)


@pytest.mark.parametrize("scope", ["partial", "full"])
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_site_has_a_quantizer_and_the_float_output_stays(name: str, scope: str) -> None:
    case = problem("w8a8", scope=scope, **PUBLISHED[name])
    images = next(case.pictures())
    with torch.no_grad():
        before = case.graph(images)
        parameters = METHODS[name](case)
        after = case.graph(images)
        model = QuantizedModel(case.graph, case.sites, parameters, case.recipe, {}, False)
        simulated = model.simulation()(images)
    assert set(parameters.weights) == {s.node for s in case.sites.weights}
    assert set(parameters.activations) == {s.value for s in case.sites.activations}
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    noise = float((simulated - before).square().sum() / before.square().sum())
    assert noise < 0.01, noise
    kinds = {q.kind for q in parameters.activations.values()} - {"uniform"}
    assert kinds <= set(METHODS[name].formats)
    assert {o.kind for o in parameters.operators.values()} <= set(METHODS[name].operators)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_runtime_computes_what_is_simulated_and_what_it_lacks_is_named(name: str) -> None:
    model = quantized(name)
    assert verify(model, calibration()).sqnr_db > 40
    said = " ".join(model.parameters.notes)
    for kind in METHODS[name].formats:
        assert kind == "power-of-two" or f"onnxruntime has no kernel for {kind}" in said  # full scope only


@pytest.mark.parametrize("name", [n for n in sorted(PUBLISHED) if METHODS[n].formats])
def test_what_was_made_for_the_simulator_is_not_exported(name: str, tmp_path: Any) -> None:
    model = quantized(name, target="simulate", scope="full")
    loaded = load(save(model, tmp_path / "out"))
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(loaded.simulation()(images), model.simulation()(images))
    with pytest.raises(TargetError, match=f"no kernel for .*, which method {name} chose in layer"):
        export(model, tmp_path / "model.onnx", target="onnxruntime")


@pytest.mark.parametrize("name", [n for n in sorted(PUBLISHED) if METHODS[n].formats])
def test_a_net_without_the_patterns_is_told_so(name: str) -> None:
    """Tiny has attention and SiLU, but neither norms nor 1×1 convolutions."""
    parameters = METHODS[name](problem(net=Tiny, **PUBLISHED[name]))
    assert name == "ptq4vit" or any(note.startswith(f"{name}: no ") for note in parameters.notes), parameters.notes


@pytest.mark.parametrize("name", [n for n in sorted(PUBLISHED) if METHODS[n].formats])
def test_formats_of_eight_bits_fall_back_by_name_where_sixteen_are_asked(name: str) -> None:
    model = quantized(name, bits="w8a16", target="simulate")
    assert name == "hyq" or "has at most 8 bits" in " ".join(model.parameters.notes)  # hyq's softmax has 8 bits anyway
    with torch.no_grad():
        assert bool(model.simulation()(torch.rand(2, 3, SIDE, SIDE)).isfinite().all())


@pytest.mark.parametrize("name", ["easyquant", "ptq4vit", "hyq", "iasvit"])
def test_the_same_seed_gives_the_same_choice(name: str) -> None:
    first, second = (METHODS[name](problem(**PUBLISHED[name])) for _ in range(2))
    for one, other in ((first.weights, second.weights), (first.activations, second.activations)):
        for key, quantizer in one.items():
            for tensor, again in zip(quantizer.buffers(), other[key].buffers(), strict=True):
                assert torch.equal(tensor, again)
