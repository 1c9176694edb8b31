"""The simulation: what reads codes, what reads floats, and that it leaves the parameters alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qhyvit.calibration.collect import Watcher
from qhyvit.graph.ops import MATMUL, WEIGHTED, aten, constant, is_call
from qhyvit.pipeline import export, quantize
from qhyvit.quantized import Parameters, QuantizedModel, copy_graph, integer_bias
from qhyvit.targets.onnxruntime import OrtSession
from quick import ranges_only
from tiny import SIDE, fresh, quantized


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def sqnr(reference: Tensor, value: Tensor) -> float:
    noise = float((reference.double() - value.double()).square().sum())
    return 10 * math.log10(float(reference.double().square().sum()) / noise) if noise else math.inf


def values_of(graph: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """Every value of a run."""
    seen: dict[str, Tensor] = {}
    names = [n.name for n in graph.graph.nodes if n.op != "output"]
    Watcher(graph, names, lambda node, value: seen.update({node.name: value})).run(x)  # type: ignore[no-untyped-call]
    return seen


def tensors_of(parameters: Parameters) -> dict[str, Tensor]:
    found = {f"bias {name}": bias for name, bias in parameters.biases.items()}
    for quantizers in (parameters.activations, parameters.weights):
        found |= {f"{name} {key}": value for name, q in quantizers.items() for key, value in q.state_dict().items()}
    return {name: value.clone() for name, value in found.items()}


def constant_operand(graph: fx.GraphModule, node: fx.Node, position: int) -> Tensor:
    value = constant(graph, node.args[position])
    assert value is not None
    return value


@pytest.mark.parametrize("changes", [{}, {"scope": "full"}, {"bits": "w6a6"}, {"activations": {"scheme": "symmetric"}}])
def test_products_of_codes_and_of_floats_agree_to_rounding(changes: dict[str, Any]) -> None:
    model = fresh(**changes)
    with torch.no_grad():
        assert sqnr(model.simulation(integer=False)(images()), model.simulation()(images())) > 40


def test_the_simulation_is_no_float_model() -> None:
    with torch.no_grad():
        exact = quantized().graph(images())
        assert 20 < sqnr(exact, quantized().simulation()(images())) < 60


@pytest.mark.parametrize("integer", [True, False])
def test_casting_the_simulation_leaves_the_parameters_alone(integer: bool) -> None:
    model = fresh(scope="full", bias_correction=True)
    before, constants = tensors_of(model.parameters), dict(model.graph.named_buffers())
    with torch.no_grad():
        single = model.simulation(integer=integer)(images())
        double = model.simulation(integer=integer).double()(images().double())
    assert double.dtype == torch.float64
    assert sqnr(double, single) > 35
    after = tensors_of(model.parameters)
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.dtype != torch.float64 for value in model.graph.buffers())
    assert all(value is constants[name] for name, value in model.graph.named_buffers())


def test_gradients_flow_to_the_pictures_and_to_what_lies_between() -> None:
    model, x = quantized(), images().requires_grad_()
    weights = torch.linspace(-1, 1, 7)

    def gradients(graph: fx.GraphModule, names: list[str]) -> list[Tensor]:
        kept: dict[str, Tensor] = {}
        out = Watcher(graph, names, lambda node, value: kept.update({node.name: value})).run(x)  # type: ignore[no-untyped-call]
        return list(torch.autograd.grad((out * weights).sum(), [x, *(kept[name] for name in names)]))

    between = [s.node for s in model.sites.weights][:-1] + [
        s.value for s in model.sites.activations if s.value != "pictures"
    ]
    exact = gradients(model.graph, between)
    straight_through = gradients(model.simulation(integer=False), between)
    for a, b in zip(exact, straight_through, strict=True):
        assert a.abs().max() > 0
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.95


def test_own_codes_and_biases_are_used() -> None:
    model = fresh()
    head = model.sites.weights[-1].node
    with torch.no_grad():
        model.parameters.codes[head] = torch.zeros_like(model.codes(head))
        model.parameters.biases[head] = torch.arange(7.0)
        for integer in (True, False):
            logits = model.simulation(integer=integer)(images(3))
            torch.testing.assert_close(logits, torch.arange(7.0).expand(3, 7), rtol=0, atol=1e-3)


# Biases -----------------------------------------------------------------------------------------------------------


def test_bias_codes_by_hand() -> None:
    scale = torch.tensor([0.1, 0.1, 2.0, 1e-12, 1e-12])
    codes = integer_bias(torch.tensor([0.26, -0.26, 3.0, 1.0, -1.0]), scale)
    assert codes.tolist() == [3, -3, 2, 2.0**31 - 128, -(2.0**31) + 128]  # 1.5 to the even 2; the last two saturate
    assert codes.double().to(torch.int32).tolist()[3:] == [2**31 - 128, -(2**31) + 128]


def test_biases_are_whole_numbers_of_the_accumulators_scale() -> None:
    model = fresh(bits="w4a4")  # coarse, so that rounding shows
    simulation = model.simulation(integer=False)
    moved = 0.0
    for node in (n for n in simulation.graph.nodes if is_call(n, WEIGHTED)):
        scale, bias = model.bias_scale(node.name), model.bias(node.name)
        rounded = constant_operand(simulation, node, 2)
        assert scale is not None
        assert bias is not None
        assert ((rounded / scale).round() - rounded / scale).abs().max() < 1e-3
        assert ((rounded - bias).abs() <= 0.501 * scale).all()
        moved = max(moved, float((rounded - bias).abs().max()))
    assert moved > 1e-4


def test_biases_stay_float_where_the_target_has_float_biases() -> None:
    model = fresh(bits="w4a4", target="simulate")
    simulation = model.simulation()
    for node in (n for n in simulation.graph.nodes if is_call(n, WEIGHTED)):
        bias = model.bias(node.name)
        assert bias is not None
        assert torch.equal(constant_operand(simulation, node, 2), bias)


def test_a_scale_per_input_channel_leaves_no_scale_for_the_bias() -> None:
    model = fresh(target="simulate", activations={"granularity": "per-channel"})
    assert all(model.bias_scale(s.node) is None for s in model.sites.weights)


# Sites ------------------------------------------------------------------------------------------------------------


class Wired(nn.Module):
    """Operands reach their products through all kinds of rearrangement; one is changed on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * SIDE, 2 * 8)
        self.second = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(1, 2).flatten(2))  # (n, 16, 16)
        a, b = x.reshape(-1, 16, 2, 8).unbind(2)
        scores = a @ b.transpose(1, 2)
        c = torch.relu(scores) @ b
        out: Tensor = self.second(c[:, 1:].flip(1).reshape(-1, 5, 3, 8).permute(0, 2, 1, 3)).flatten(1)
        return out


def wired(**changes: Any) -> QuantizedModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return quantize(Wired(), calib=images(), input_size=SIDE, **ranges_only(changes))


def only(model: QuantizedModel, target: object) -> str:
    (name,) = (n.name for n in model.nodes.values() if is_call(n, target))
    return name


def test_codes_are_traced_through_layout_operators() -> None:
    model = wired()
    products = [n for n in model.nodes.values() if is_call(n, MATMUL)]
    layers = [n for n in model.nodes.values() if is_call(n, WEIGHTED)]
    assert len(products) == len(layers) == 2
    assert model.input_site(layers[0], 0) == "pictures"
    b_from_first, b_from_second = model.input_site(products[0], 1), model.input_site(products[1], 1)
    assert b_from_first == b_from_second is not None  # the same part of the split, once transposed, once not
    assert model.input_site(products[0], 0) not in (None, b_from_first)
    # not the product before it: relu computes
    assert model.input_site(products[1], 0) == only(model, aten.relu.default)
    # not the product before it: a part of a tensor may have a range of its own; the rest of the way keeps every number
    assert model.input_site(layers[1], 0) == only(model, aten.slice.Tensor)
    assert model.input_site(model.nodes[only(model, aten.relu.default)], 0) is None  # reads floats


def test_every_operand_of_an_integer_product_is_fake_quantized() -> None:
    """In the simulation, whatever a product reads takes no more values than there are codes."""
    model = wired(bits="w3a3")
    graph = model.simulation()
    with torch.no_grad():
        values = values_of(graph, images())
    products = [n for n in graph.graph.nodes if n.op == "call_module" and str(n.target).startswith("product")]
    assert len(products) == 4
    for product in products:
        for operand in product.args:
            assert 2 <= len(torch.unique(values[operand.name])) <= 8


class Skip(nn.Module):
    """A layer that adds nothing, on a value that is added as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SIDE * SIDE, 3 * SIDE * SIDE)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1) * 2
        out: Tensor = self.layer(x) + x
        return out


def test_readers_outside_of_a_site_see_floats(tmp_path: Path) -> None:
    model = quantize(Skip(), calib=images(), input_size=SIDE, bits="w2a2", method="mse")
    runtime = OrtSession(export(model, tmp_path / "model.onnx"), 1)
    assert runtime.operators()[0] == 1
    expected = images().flatten(1) * 2
    with torch.no_grad():
        assert torch.equal(model.simulation()(images()), expected)
        assert torch.equal(model.simulation(integer=False)(images()), expected)
    assert torch.equal(runtime.run(images()), expected)

    full = quantize(Skip(), calib=images(), input_size=SIDE, bits="w2a2", method="mse", scope="full")
    with torch.no_grad():
        assert len(torch.unique(full.simulation()(images()))) <= 4  # here the sum reads codes too


def test_a_copied_graph_is_independent() -> None:
    model = quantized()
    copy = copy_graph(model.graph)
    assert [n.name for n in copy.graph.nodes] == [n.name for n in model.graph.graph.nodes]
    for node in list(copy.graph.nodes):
        if node.op == "output":
            node.args = (next(n for n in copy.graph.nodes if n.op == "placeholder"),)
    copy.recompile()
    with torch.no_grad():
        assert torch.equal(copy(images()), images())
        assert model.graph(images()).shape == (16, 7)
