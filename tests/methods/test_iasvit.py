"""I&S-ViT: the softmax that serves the product, exact folds, weights alone tuned, stages worth their iterations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hybrid import SIDE, Hybrid, logits, problem
from qhyvit.calibration.collect import Watcher
from qhyvit.errors import RecipeError
from qhyvit.graph.blocks import find_units
from qhyvit.graph.ops import MATMUL, WEIGHTED, constant, is_call
from qhyvit.graph.patterns import NORMS, folds
from qhyvit.methods import Problem
from qhyvit.methods.iasvit import ETAS, iasvit
from qhyvit.methods.ranges import set_ranges
from qhyvit.methods.repqvit import channel_quantizer, channel_ranges, fold_norms, per_tensor, reparameterize
from qhyvit.pipeline import quantize
from qhyvit.quantized import Parameters, QuantizedModel
from qhyvit.quantizers.sulq import ShiftUniformLog2, sulq_from_range
from qhyvit.search.prefix import Prefix, first_batches
from qhyvit.search.reconstruction import Batch
from qhyvit.search.tuning import Settings, TunedUnit
from qhyvit.search.unit_walk import unit_batches
from qhyvit.verification import verify
from tiny import Tiny, calibration

QUICK: dict[str, Any] = {"iterations": 10, "batch": 4, "rate": 1e-3}


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def net_error(case: Problem, parameters: Parameters, pictures: Tensor) -> float:
    """Lost share of the logits' square."""
    simulation = QuantizedModel(case.graph, case.sites, parameters, case.recipe, {}, False).simulation(integer=False)
    with torch.no_grad():
        target, found = case.graph(pictures), simulation(pictures)
    return float((found - target).square().sum() / target.square().sum())


def values(graph: fx.GraphModule, images: Tensor, names: set[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        Watcher(graph, names, lambda node, value: found.update({node.name: value})).run(images)
    return found


def test_a_per_channel_quantizer_and_the_folded_one_have_the_same_codes() -> None:
    case = problem("w4a4", dtype=torch.float64)
    images, float_output = next(case.pictures()), logits(case)
    found = folds(case.graph, case.sites)
    assert len(found) == 3
    for fold, (low, high) in zip(found, channel_ranges(case, found), strict=True):
        low, high = low.double(), high.double()
        before = values(case.graph, images, {fold.site.value})[fold.site.value]
        per_channel = channel_quantizer(fold, low, high, 4)
        assert per_channel.axis == fold.site.channel_axis
        shared = reparameterize(case, fold, low, high, 4)
        assert shared.axis is None
        after = values(case.graph, images, {fold.site.value})[fold.site.value]
        same = per_channel.quantize(before) == shared.quantize(after)
        assert float(same.float().mean()) > 0.9999  # a tie may fall to the other side
        assert len(per_channel.quantize(before).unique()) > 8
    assert float((logits(case) - float_output).abs().max() / float_output.abs().max()) <= 4e-13


def test_the_float_function_stays_though_weights_are_tuned() -> None:
    case = problem("w4a4", **QUICK)
    before = logits(case)
    parameters = iasvit(case)
    assert float((logits(case) - before).abs().max() / before.abs().max()) <= 4e-6
    assert parameters.codes
    assert all(q.axis is None for q in parameters.activations.values())


def test_what_is_reported_of_the_last_unit_is_what_the_net_computes() -> None:
    """Codes, biases and folds together give the simulation what the tuning has seen."""
    case = problem("w4a4", **QUICK)
    parameters = iasvit(case)
    assert parameters.biases  # tuned weights, folded, leave another bias than float ones
    errors = [net_error(case, parameters, images) for images in case.pictures()]
    assert sum(errors) / len(errors) == pytest.approx(parameters.report["iasvit"][-1]["after"], rel=1e-3)


def first_transformer(case: Problem) -> tuple[Parameters, TunedUnit, list[Batch]]:
    """The first unit with a norm and several layers, and what it is learned from."""
    parameters = set_ranges(case, "mse")
    prefix = Prefix(case, parameters, first_batches(case.pictures(), 8, 4))
    nodes = {n.name: n for n in prefix.nodes}
    for unit in find_units(case.graph):
        if len(unit.layers) > 1 and any(is_call(nodes[n], NORMS) for n in unit.nodes):
            return parameters, TunedUnit(prefix.execution, unit), unit_batches(prefix, unit)
        prefix.advance([nodes[n] for n in unit.nodes])
    raise AssertionError


@pytest.mark.parametrize("coded", [False, True])
def test_tuning_changes_weights_and_nothing_else(coded: bool) -> None:
    case = problem("w3a8")
    parameters, unit, batches = first_transformer(case)
    quantizers = {**parameters.weights, **parameters.activations}
    steps = {name: copy.deepcopy(q.state_dict()) for name, q in quantizers.items()}
    constants = {name: tensor.clone() for name, tensor in case.graph.named_buffers()}
    before = unit.error(batches)
    weights = unit.tune(batches, Settings(100, 1e-3), torch.Generator().manual_seed(0), coded=coded)
    for name, state in steps.items():
        assert all(torch.equal(tensor, quantizers[name].state_dict()[key]) for key, tensor in state.items())
    assert all(torch.equal(tensor, constants[name]) for name, tensor in case.graph.named_buffers())
    assert all(not torch.equal(weight, unit.weights()[name]) for name, weight in weights.items())
    if coded:
        unit.weights = lambda: weights  # type: ignore[method-assign]
        assert unit.error(batches) < 0.9 * before


def test_norms_and_the_steps_of_activations_are_those_before_tuning() -> None:
    case, plain = problem("w4a4", **QUICK), problem("w4a4")
    steps = {s.value: per_tensor(plain, s) for s in plain.sites.activations}
    steps |= fold_norms(plain, "plain", [])
    parameters = iasvit(case)
    for value, quantizer in parameters.activations.items():
        if not value.startswith("softmax"):
            for name, tensor in quantizer.state_dict().items():
                assert torch.equal(tensor, steps[value].state_dict()[name])
    for node, twin in zip(case.graph.graph.nodes, plain.graph.graph.nodes, strict=True):
        if is_call(node, NORMS | WEIGHTED):  # the float layers are folded, not tuned
            for operand, other in zip(node.args[1:], twin.args[1:], strict=True):
                found = constant(case.graph, operand)
                assert found is None or torch.equal(found, constant(plain.graph, other))  # type: ignore[arg-type]


class Peaked(Hybrid):
    """Attention that looks at one position."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.qkv.weight[: 2 * self.qkv.in_features] *= 1.5


@pytest.mark.parametrize(("bits", "net"), [("w4a3", Hybrid), ("w4a4", Peaked), ("w8a8", Hybrid)])
def test_the_softmax_has_the_least_error_of_the_product(bits: str, net: type[nn.Module]) -> None:
    case = problem(bits, net=net, **QUICK)
    site = next(s for s in case.sites.activations if s.value.startswith("softmax"))
    product = next(n for n in case.graph.graph.nodes if is_call(n, MATMUL) and n.args[0].name == site.value)
    seen = values(case.graph, torch.cat(list(case.pictures())), {site.value, product.args[1].name})
    a, v = seen[site.value], seen[product.args[1].name]

    def error(quantizer: nn.Module) -> float:
        return float(((quantizer(a) - a) @ v).square().sum())

    width = case.recipe.activation_bits
    shifted = [error(sulq_from_range(a.min(), a.max(), eta, bits=width)) for eta in ETAS]
    others = [error(per_tensor(case, site))]
    chosen = iasvit(case).activations[site.value]
    assert error(chosen) <= 1.001 * min(*shifted, *others)
    assert isinstance(chosen, ShiftUniformLog2) == (min(shifted) <= error(chosen) * 1.001)
    assert len(chosen(torch.linspace(0, 1, 100000) ** 8).unique()) <= 2**width


def test_softmax_stays_shift_uniform_log2_where_that_is_asked_for() -> None:
    parameters = iasvit(problem("w8a8", softmax="sulq", **QUICK))
    assert any("1 of 1 softmax outputs are shift-uniform-log2" in note for note in parameters.notes)
    assert sum(isinstance(q, ShiftUniformLog2) for q in parameters.activations.values()) == 1


def with_more_pictures(**options: Any) -> Problem:
    case = problem("w4a4", **options)
    case.pictures, case.picture_count = lambda: iter(noise(32, 0).split(8)), 32
    return case


def test_stages_are_better_than_tuning_directly_for_as_long() -> None:
    """Directly: quantized weights from the beginning, norm outputs with one scale per tensor. On pictures not seen."""
    options = {"iterations": 40, "batch": 8, "rate": 4e-4}
    errors = {}
    for name, given in {
        "staged": options,
        "direct": {**options, "smooth": False, "fold": False},
        "not tuned": {**options, "iterations": 1, "rate": 1e-12},
    }.items():
        case = with_more_pictures(**given)
        errors[name] = net_error(case, iasvit(case), noise(64, 1))
    assert errors["staged"] < 0.85 * errors["direct"], errors
    assert errors["staged"] < 0.9 * errors["not tuned"], errors


def test_no_unit_is_worse_than_with_untuned_weights() -> None:
    case = problem("w3a4", iterations=5, batch=4, rate=0.5)  # a rate that ruins weights
    report = iasvit(case).report["iasvit"]
    assert all(entry["after"] <= entry["before"] for entry in report)
    assert any(entry["after"] == entry["before"] for entry in report)
    assert sum(len(entry["modules"]) for entry in report) == len(case.sites.weights)


def test_a_stopped_run_goes_on_and_ends_where_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "state": str(tmp_path / "state")}
    unbroken_case = problem("w4a4", **{**options, "state": str(tmp_path / "other")})
    unbroken = iasvit(unbroken_case)
    calls, tune = [], TunedUnit.tune

    def stops(self: TunedUnit, *args: Any, **more: Any) -> dict[str, Tensor]:
        calls.append(args)
        if len(calls) == 6:  # the second stage of the third unit
            raise KeyboardInterrupt
        return tune(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(TunedUnit, "tune", stops)
        with pytest.raises(KeyboardInterrupt):
            iasvit(problem("w4a4", **options))
    assert len(list((tmp_path / "state").glob("unit_*.safetensors"))) == 2
    case = problem("w4a4", **options)
    resumed = iasvit(case)
    assert resumed.report == unbroken.report
    for one, other in ((unbroken.codes, resumed.codes), (unbroken.biases, resumed.biases)):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for name, quantizer in {**unbroken.weights, **unbroken.activations}.items():
        again = {**resumed.weights, **resumed.activations}[name].state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in quantizer.state_dict().items())
    assert net_error(case, resumed, noise(4, 2)) == net_error(unbroken_case, unbroken, noise(4, 2))
    with pytest.raises(RecipeError, match="belongs to another recipe or net"):
        iasvit(problem("w3a4", **options))


def test_what_does_not_apply_is_said() -> None:
    assert any("no norm feeds only linears" in note for note in iasvit(problem(net=Tiny, **QUICK)).notes)
    wide = " ".join(iasvit(problem("w8a16", **QUICK)).notes)
    assert "iasvit: sulq has at most 8 bits; 1 softmax outputs are uint16" in wide
    bound = " ".join(iasvit(problem("w4a4", target="onnxruntime", **QUICK)).notes)
    assert "no kernel for sulq; 1 softmax outputs are uint4 with the step of least squared error" in bound
    assert "no kernel for asymmetric weights; they are symmetric instead" in bound


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))
        return out


def test_a_plain_convolutional_net_is_tuned_and_told() -> None:
    parameters = iasvit(problem(net=Convolutions, **QUICK))
    assert any("no quantized softmax feeds a product" in note for note in parameters.notes)
    assert len(parameters.report["iasvit"]) == 3


def test_the_integers_of_the_tuning_are_exported() -> None:
    model = quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="iasvit", options=QUICK)
    assert model.parameters.codes
    assert verify(model, calibration()).sqnr_db > 40
    for node, codes in model.parameters.codes.items():
        assert torch.equal(model.codes(node), codes)
