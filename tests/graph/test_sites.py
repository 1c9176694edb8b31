"""Where quantizers stand, by scope, overrides and target."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import timm
import torch
from identity import pictures
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qhyvit.graph.capture import capture
from qhyvit.graph.ops import LAYOUT, is_call
from qhyvit.graph.sites import ActivationSite, place, source_site
from qhyvit.methods import Problem
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import QuantizedModel
from qhyvit.recipe import Recipe


@pytest.fixture(scope="module")
def mobilevit() -> fx.GraphModule:
    return capture(timm.create_model("mobilevit_xxs"), pictures(2, (3, 64, 64)))


class Net(nn.Module):
    """A convolution, attention over 16 positions, a residual and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.depthwise(x)
        y = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(y).chunk(3, -1)
        y = y + F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.head(y.mean(1))
        return out


@pytest.fixture(scope="module")
def net() -> fx.GraphModule:
    return capture(Net(), pictures(2, (3, 8, 8)))


def by_value(graph: fx.GraphModule, **options: object) -> dict[str, ActivationSite]:
    return {s.value: s for s in place(graph, **options).activations}  # type: ignore[arg-type]


def test_mobilevit_has_the_sites_of_the_paper(mobilevit: fx.GraphModule) -> None:
    sites = place(mobilevit)
    assert len(sites.weights) == 72
    assert Counter(s.kind for s in sites.weights) == {"conv": 35, "linear": 37}
    assert sum(s.depthwise for s in sites.weights) == 7
    products = [n for n in mobilevit.graph.nodes if n.target == torch.ops.aten.matmul.default]
    assert len(products) == 18
    assert all(site.role == "input" for site in sites.activations)
    assert all(source_site(sites, product, position) for product in products for position in (0, 1))
    nodes = {n.name: n for n in mobilevit.graph.nodes}
    assert all(source_site(sites, nodes[site.node], 0) for site in sites.weights)


def test_partial_scope_quantizes_inputs_of_products_for_them_alone(net: fx.GraphModule) -> None:
    sites = by_value(net)
    assert sites["pictures"].readers == ("stem_conv2d",)
    assert sites["relu"].readers == ("depthwise_conv2d",)  # the residual reads the float value
    assert sites["softmax"].readers == ("matmul_2",)
    assert not {"matmul", "depthwise_conv2d", "add_2"} & set(sites)
    assert sites["mean"].readers == ("head_linear",)
    assert all(s.role == "input" for s in sites.values())


def test_query_key_and_value_have_sites_of_their_own(net: fx.GraphModule) -> None:
    chunks = [s for s in by_value(net).values() if s.value.startswith("getitem")]
    assert len(chunks) == 3
    assert not any(s.value == "qkv_linear" for s in by_value(net).values())


def test_a_site_stands_before_a_rearrangement_where_all_readers_agree(net: fx.GraphModule) -> None:
    """The residual reads the rearranged value too, so the quantizer stands after it; without it, before."""
    assert "transpose" in by_value(net)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(F.relu(x).flatten(2).transpose(1, 2))
            return out.mean(1)

    sites = by_value(capture(Plain(), pictures(2, (3, 4, 4))))
    assert list(sites) == ["relu"]
    assert sites["relu"].readers == ("reshape",)
    assert sites["relu"].module == "head"


def test_full_scope_leaves_nothing_float_between_pictures_and_logits(net: fx.GraphModule) -> None:
    sites = by_value(net, scope="full")
    for node in net.graph.nodes:
        if node.op not in {"call_function", "placeholder"} or node.name == "head_linear" or is_call(node, LAYOUT):
            continue
        assert set(sites[node.name].readers) == {u.name for u in node.users}, node.name
    assert not any(is_call(n, LAYOUT) and n.name in sites for n in net.graph.nodes)  # they move codes
    assert "head_linear" not in sites


def test_masked_scores_are_quantized_before_the_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("allowed", torch.eye(16, dtype=torch.bool))

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).transpose(1, 2)
            return F.scaled_dot_product_attention(x, x, x, attn_mask=self.allowed).mean(1)

    sites = by_value(capture(Masked(), pictures(2, (3, 4, 4))), scope="full")
    assert sites["matmul"].readers == ("add",)
    assert "add" not in sites
    assert "softmax" in sites


def test_outputs_that_the_target_needs_quantized(net: fx.GraphModule) -> None:
    sites = by_value(net, quantized_outputs=frozenset({"conv"}))
    assert {s.value for s in sites.values() if s.role == "output"} == {"stem_conv2d", "depthwise_conv2d"}
    assert sites["stem_conv2d"].readers == ("relu",)
    assert sites["stem_conv2d"].channel_axis == 1
    assert {s.value for s in sites.values() if s.role == "input"} == set(by_value(net))


def test_layers_left_float_have_no_sites(net: fx.GraphModule) -> None:
    options = {"is_float": lambda module: module in {"stem", "qkv"}, "quantized_outputs": frozenset({"conv"})}
    sites = place(net, **options)  # type: ignore[arg-type]
    assert {s.node for s in sites.weights} == {"depthwise_conv2d", "head_linear"}
    readers = {r for s in sites.activations for r in s.readers}
    assert not {"stem_conv2d", "qkv_linear"} & readers
    assert "stem_conv2d" not in {s.value for s in sites.activations}
    assert "pictures" not in {s.value for s in sites.activations}


def test_weight_sites_tell_shape_kind_and_module(net: fx.GraphModule) -> None:
    sites = {s.node: s for s in place(net).weights}
    assert sites["depthwise_conv2d"].depthwise
    assert not sites["stem_conv2d"].depthwise
    assert sites["depthwise_conv2d"].shape == (8, 1, 3, 3)
    assert sites["qkv_linear"].kind == "linear"
    assert sites["qkv_linear"].module == "qkv"


def test_a_product_with_a_constant_matrix_has_a_weight_site() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 5))

        def forward(self, x: Tensor) -> Tensor:
            return (F.relu(x) @ self.matrix).mean((1, 2))

    sites = place(capture(Product(), pictures(2, (3, 8, 8))))
    assert [s.shape for s in sites.weights] == [(5, 8)]


class Divided(nn.Module):
    """Linear attention as in EfficientViT: the last channel of a product is the sum that the others are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x)).flatten(2).transpose(1, 2)
        product = y @ (y.transpose(1, 2) @ F.pad(y, (0, 1), value=1.0))
        y = product[..., :-1] / (product[..., -1:] + 1e-15)
        y = y / torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(1e-12)
        out: Tensor = self.head(y.mean(1))
        return out


@pytest.mark.parametrize("outputs", [frozenset(), frozenset({"matmul"})])
def test_what_is_divided_by_is_not_quantized(outputs: frozenset[str]) -> None:
    images = pictures(2, (3, 8, 8))
    images[1] *= 0.01  # small beside the first: 8-bit codes of its sums are 0
    net = Divided()
    with torch.no_grad():
        net.stem.bias.zero_()  # type: ignore[union-attr]
    graph = capture(net, images)
    find = partial(place, scope="full", quantized_outputs=outputs)
    recipe = Recipe(scope="full", method="minmax", target="simulate")
    problem = Problem(graph, find(graph), recipe, lambda: iter([images]), len(images), find)
    quantized = QuantizedModel(graph, problem.sites, set_ranges(problem, "minmax"), recipe, {})
    with torch.no_grad():
        wanted, got = graph(images), quantized.simulation()(images)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0.1 * float(wanted[0].std()))
    divisors = {n.args[1].name for n in graph.graph.nodes if n.target == torch.ops.aten.div.Tensor}
    assert divisors.isdisjoint(s.value for s in problem.sites.activations)
