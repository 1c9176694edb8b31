"""The search of method qhyvit on a small net."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from tests.tiny import SIDE, Tiny
from torch import Tensor, nn

from qhyvit.calibration.samples import LayerSample, ProductSample
from qhyvit.errors import RecipeError
from qhyvit.graph.capture import capture
from qhyvit.graph.ops import weight_of
from qhyvit.graph.sites import Sites, place
from qhyvit.methods.base import Problem, on_pictures
from qhyvit.methods.qhyvit import RELEASED_FACTORS, VARIANTS, Options, options_of, qhyvit
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import Parameters, copy_graph
from qhyvit.recipe import Recipe
from qhyvit.search import layers, operands
from qhyvit.search.gather import gather
from qhyvit.search.layers import layer_errors as errors_of_layers
from qhyvit.search.operands import Choice, Evaluate, Range, Space, search


class Projected(Tiny):
    """With a projection behind the attention, whose input's axis 1 holds heads, not channels."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(nn.functional.silu(self.norm(self.stem(x)))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.head(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)
        return out


_GRAPHS: dict[type[nn.Module], torch.fx.GraphModule] = {}


def problem(
    bits: str = "w4a4",
    target: str = "onnxruntime",
    net: type[nn.Module] = Tiny,
    scope: Literal["partial", "full"] = "partial",
    **options: object,
) -> Problem:
    torch.manual_seed(0)
    images = torch.randn(8, 3, SIDE, SIDE)
    if net not in _GRAPHS:
        _GRAPHS[net] = capture(net(), images)
    graph = copy_graph(_GRAPHS[net])

    def find(captured: torch.fx.GraphModule) -> Sites:
        return place(captured, scope=scope, quantized_outputs=frozenset({"conv"}))

    recipe = Recipe(
        bits=bits,
        scope=scope,
        method="qhyvit",
        target=target,
        options={"balance": False, "bias": False, "bridges": False, **options},
    )
    return Problem(graph, find(graph), recipe, lambda: iter(images.split(4)), len(images), find)


def layer_errors(case: Problem, parameters: Parameters) -> dict[str, float]:
    """Weighted error of each sampled layer with its own quantized weight and input."""
    samples = gather(case, "none", 1024)
    found, nodes = {}, {n.name: n for n in case.graph.graph.nodes}
    for name, error in errors_of_layers(case.graph, samples).items():
        source = next((s.value for s in case.sites.activations if name in s.readers), None)
        quantizer = parameters.activations[source] if source else None
        weight = error.grouped(parameters.weights[name](weight_of(case.graph, nodes[name])[0]))  # type: ignore[index]
        found[name] = float(error(error.quantized_input(quantizer), weight).sum())
    return found


def test_sampling_gathers_the_statistics_that_a_pass_of_its_own_gives() -> None:
    sampled, passed = problem(), problem()
    sampled.per_channel = passed.per_channel = True
    gather(sampled, "none", 16)
    assert "statistics" in vars(sampled)
    for value, expected in passed.statistics.items():
        found = sampled.statistics[value]
        assert (found.low, found.high, found.count) == (expected.low, expected.high, expected.count)
        assert torch.equal(found.histogram()[0], expected.histogram()[0])
        assert found.channel_low is None or torch.equal(found.channel_low, expected.channel_low)


def test_sampling_another_graph_gathers_no_statistics() -> None:
    """They are those of the float network."""
    case = problem()
    gather(case, "none", 16, graph=case.graph)
    assert "statistics" not in vars(case)


def test_no_layer_is_worse_than_where_the_search_began() -> None:
    case = problem()
    before, after = layer_errors(case, set_ranges(case, "mse")), layer_errors(case, qhyvit(case))
    assert before.keys() == after.keys()
    assert all(after[name] <= before[name] * 1.0001 for name in before)
    assert sum(after.values()) < 0.95 * sum(before.values())


@pytest.mark.parametrize("target", ["onnxruntime", "simulate"])
@pytest.mark.parametrize("gradient", ["none", "fisher"])
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_every_choice_costs_at_most_one_percent_against_brute_force(
    monkeypatch: pytest.MonkeyPatch, target: str, gradient: str, bits: str
) -> None:
    compared = []

    def both(space: Space, extremes: Range, evaluate: Evaluate, incumbent: Choice, **how: Any) -> Choice:
        brute = search(replace(space, coarse=1), extremes, evaluate, incumbent, separable=how["separable"])
        fast = search(space, extremes, evaluate, incumbent, **how)
        compared.append(
            (round(fast.error / brute.error, 4), fast.quantizer.signed, fast.quantizer.scheme, how.get("cost"))
        )
        return fast

    monkeypatch.setattr(layers, "search", both)
    monkeypatch.setattr(
        operands, "BUDGET", 1 << 24
    )  # as if the layers were larger; the smallest are brute force anyway
    qhyvit(problem(bits, target, gradient=gradient, rounds=1))
    assert len(compared) >= 4 + 6  # weights and activations
    assert max(c[0] for c in compared) <= 1.01, sorted(compared)[-4:]


def test_a_larger_space_of_choices_leaves_less_error() -> None:
    """All from the same start, and on the pictures that were searched on: what others gain is not asked here."""
    totals = {}
    for variant in VARIANTS:
        same: dict[str, Any] = {"gradient": "none", "positions": 256, "start": "minmax", "held_out": False}
        case = problem("w4a4", "simulate", variant=variant, **same)
        totals[variant] = sum(layer_errors(case, qhyvit(case)).values())
    assert totals["ours"] <= totals["paper"] * 1.01
    assert totals["paper"] < totals["released"]


def test_the_released_rules_are_symmetric_and_by_channel_for_convolutions_only() -> None:
    case = problem("w8a8", "simulate", variant="released", start="minmax")
    parameters = qhyvit(case)
    kinds = {s.node: s.kind for s in case.sites.weights}
    for name, quantizer in parameters.weights.items():
        assert quantizer.scheme == "symmetric"
        assert (quantizer.axis is None) == (kinds[name] == "linear"), name
    assert torch.isclose(RELEASED_FACTORS[-1], torch.tensor(1.1881))


def test_biases_take_the_mean_error_when_asked() -> None:
    assert not qhyvit(problem(rounds=1)).correct_biases
    assert qhyvit(problem(rounds=1, bias=True)).correct_biases


@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel"])
def test_heads_are_no_channels_of_the_layer_behind_attention(granularity: str) -> None:
    case = problem("w4a4", "simulate", net=Projected, rounds=1)
    case.recipe = case.recipe.updated(activations={"granularity": granularity})
    parameters = qhyvit(case)
    (site,) = [s for s in case.sites.activations if s.module == "head"]
    assert site.shape == (1, 2, 16, 8)
    assert parameters.activations[site.value].axis is None


def test_attention_operands_may_have_a_scale_for_each_head() -> None:
    case = problem("w4a4", "simulate", scheme=False)
    parameters = qhyvit(case)
    heads = [s for s in case.sites.activations if len(s.shape) == 4 and s.shape[1] == 2]
    by_head = [parameters.activations[s.value] for s in heads if parameters.activations[s.value].axis == 1]
    assert by_head
    assert all(len(q.scale) == 2 for q in by_head)


class LoudValues(Tiny):
    """Values are far larger than queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.qkv.weight[32:] *= 30


def test_queries_keys_and_values_in_one_site_are_all_heard() -> None:
    """In full scope the layer's output is coded as a whole; a step fit for the scores would clip the values."""
    case = problem("w8a8", net=LoudValues, scope="full")
    (site,) = [s for s in case.sites.activations if s.module == "qkv" and s.role == "output"]
    quantizer, statistics = qhyvit(case).uniform(site.value), case.statistics[site.value]
    reach = float(quantizer.scale) * 255
    assert reach > 0.5 * float(statistics.high - statistics.low)


class Placed(Tiny):
    """Queries are multiplied by a table, as relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 8, 16))  # by head; a single one would be a linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(nn.functional.silu(self.norm(self.stem(x)))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) + q @ self.table
        out: Tensor = self.head((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1)
        return out


def test_a_product_with_a_constant_is_sampled_like_any() -> None:
    case = problem(net=Placed)
    nodes = {n.name: n for n in case.graph.graph.nodes}
    samples = {name: s for name, s in gather(case, "none", 64).items() if isinstance(s, ProductSample)}
    tables = [s for name, s in samples.items() if any(n.op == "get_attr" for n in nodes[name].all_input_nodes)]
    assert (len(tables), len(samples)) == (1, 3)
    torch.testing.assert_close(tables[0].a @ tables[0].b, tables[0].y)
    assert set(qhyvit(case).activations) == {s.value for s in case.sites.activations}


@pytest.mark.parametrize("source", ["default_quant", "fisher", "none"])
def test_each_gradient_source_weights_the_samples(source: str) -> None:
    case = problem("w8a8")
    samples = gather(case, source, 256)  # type: ignore[arg-type]
    layers = [s for s in samples.values() if isinstance(s, LayerSample)]
    assert len(layers) == len(case.sites.weights)
    for sample in layers:
        assert torch.isclose(sample.weight.mean(), torch.tensor(1.0), atol=1e-4)
        assert (sample.weight.std() > 0.05) or source == "none"


def test_the_same_seed_gives_the_same_choice() -> None:
    first, second = qhyvit(problem(gradient="fisher")), qhyvit(problem(gradient="fisher"))
    assert all(torch.equal(q.scale, second.weights[n].scale) for n, q in first.weights.items())
    assert all(torch.equal(q.scale, second.activations[n].scale) for n, q in first.activations.items())


def test_options_are_checked_by_name() -> None:
    assert options_of({}) == Options()
    with pytest.raises(RecipeError, match=r"options\.gradiend"):
        options_of({"gradiend": "fisher"})
    with pytest.raises(RecipeError, match=r"options\.gradient.*fisher.*magic"):
        options_of({"gradient": "magic"})
    with pytest.raises(RecipeError, match=r"options\.variant.*paper"):
        options_of({"variant": "journal"})
    with pytest.raises(RecipeError, match=r"options\.rounds"):
        options_of({"rounds": "many"})


class Spread(nn.Module):
    """Twelve channels between two convolutions: red makes the four small ones, the others the large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 12, 1, bias=False), nn.Conv2d(12, 8, 1), nn.Linear(8, 5)
        weight = torch.zeros(12, 3)
        weight[:4, 0], weight[4:8, 1], weight[8:, 2] = 0.01, 1.0, 1.0
        with torch.no_grad():
            self.first.weight.copy_(weight.view(12, 3, 1, 1))
            self.second.weight.div_(weight.sum(1).view(1, 12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(nn.functional.silu(self.second(self.first(x))).mean((2, 3)))
        return out


@pytest.mark.parametrize(("red", "evened"), [(1.0, "1 residual streams"), (100.0, "0 residual streams")])
def test_channels_are_evened_out_only_if_new_pictures_gain_by_it(red: float, evened: str) -> None:
    case = problem("w8a8", net=Spread, balance=True)
    images = torch.cat(list(case.pictures()))
    images[6:, 0] *= red  # of the last quarter, which leaves the small channels' ranges by far
    case.pictures = lambda: iter(images.split(4))
    assert evened in qhyvit(case).notes[0]


class Mild(Spread):
    """Channels four times apart, at all positions or at one."""

    pool = 1

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.first.weight[:4] *= 25
            self.second.weight[:, :4] /= 25

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(nn.functional.avg_pool2d(x, self.pool))).mean((2, 3)))
        return out


class MildPooled(Mild):
    pool = SIDE


class MildTwice(Mild):
    """The same channels read at all positions by one layer and pooled by another."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.head(self.second(x).mean((2, 3))) + self.pooled(x.mean((2, 3)))
        return out


@pytest.mark.parametrize(
    ("net", "evened"),
    [(Mild, "1 residual streams"), (MildPooled, "0 residual streams"), (MildTwice, "1 residual streams")],
)
def test_a_small_gain_is_believed_only_if_many_numbers_tell_of_it(net: type[nn.Module], evened: str) -> None:
    case = problem("w8a4", net=net, balance=True)
    images = torch.cat(list(case.pictures()))
    images += torch.sign(torch.randn(8, 3, 1, 1))  # pooled, pictures still differ
    images[1::2] = -images[::2]  # there is nothing to shift
    case.pictures = lambda: iter(images.split(4))
    assert evened in qhyvit(case).notes[0]


def test_a_problem_on_some_of_its_pictures() -> None:
    case = problem()
    whole = torch.cat(list(case.pictures()))
    part = on_pictures(case, 3, 6)
    assert torch.equal(torch.cat(list(part.pictures())), whole[3:6])
    assert part.picture_count == 3
    bounds = {name: (float(s.low), float(s.high)) for name, s in part.statistics.items()}
    assert bounds != {name: (float(s.low), float(s.high)) for name, s in case.statistics.items()}
    case.pictures = lambda: iter([whole[3:6]])
    case.refresh()
    assert bounds == {name: (float(s.low), float(s.high)) for name, s in case.statistics.items()}


class Pooled(nn.Module):
    """A head behind pooled features: few numbers a channel, against the many of the convolution's input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 64, 4, 4), nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 7)
        with torch.no_grad():
            self.stem.weight.mul_(torch.logspace(-2, 0, 64).view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(nn.functional.silu(self.stem(x))).amax((2, 3)))
        return out


def test_scales_per_channel_only_where_other_pictures_gain_from_them() -> None:
    axes = {}
    for held_out in (False, True):
        case = problem("w6a6", target="simulate", net=Pooled, held_out=held_out)
        quantizers = qhyvit(case).activations
        axes[held_out] = {s.readers[0]: quantizers[s.value].axis for s in case.sites.activations}  # type: ignore[attr-defined]
    head = next(name for name in axes[True] if name.startswith("head"))
    body = next(name for name in axes[True] if name.startswith("body"))
    assert axes[False][head] is not None
    assert axes[True][head] is None
    assert axes[True][body] is not None  # channels 100 times apart
