"""What a shift or factor would bring, against the rewritten and quantized graph; and what the search makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import qhyvit
from qhyvit.calibration.samples import LayerSample
from qhyvit.graph.affine import is_padded
from qhyvit.graph.balance import balance
from qhyvit.graph.capture import capture
from qhyvit.graph.ops import aten, weight_of
from qhyvit.graph.patterns import source
from qhyvit.graph.sites import Sites, place
from qhyvit.methods.base import Problem
from qhyvit.quantized import copy_graph
from qhyvit.quantizers.uniform import uniform_from_range
from qhyvit.recipe import Recipe
from qhyvit.runtime import session
from qhyvit.search.balancing import SHRINK, ChangedInput, candidates, changed_error, off_zero
from qhyvit.search.layers import layer_errors


class Positive(nn.Module):
    """Half of the channels before a padded convolution lie far above 0, behind SiLU or right behind a convolution."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.stem, self.activation = nn.Conv2d(3, 8, 1), activation
            self.wide, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 5)
        with torch.no_grad():
            self.stem.bias[:4] += torch.tensor([10.0, 20.0, 30.0, 40.0])  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.wide(self.activation(self.stem(x)))).mean((2, 3)))
        return out


def problem(bits: str) -> tuple[Problem, Tensor]:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def find(captured: fx.GraphModule) -> Sites:
        return place(captured, quantized_outputs=frozenset({"conv"}))

    graph = capture(Positive(nn.SiLU()), images)
    return Problem(graph, find(graph), Recipe(bits=bits), lambda: iter([images]), len(images), find, True), images


class Values(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, x: Tensor) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.run(x)


def test_the_error_before_padding_is_that_of_the_rewritten_quantized_graph() -> None:
    net, images = problem("w6a4")
    (conv,) = (n for n in net.graph.graph.nodes if is_padded(n))
    silu = conv.args[0]
    values = Values(net.graph, images).env
    x, y = values[silu], values[conv]
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 1, 8 * 9)
    outputs = y.flatten(2).transpose(1, 2).reshape(-1, 1, 6)
    errors = layer_errors(net.graph, {conv.name: LayerSample(patches, outputs, torch.ones_like(outputs))})
    site = next(s for s in net.sites.activations if s.value == silu.name)
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    assert off_zero(low, high).tolist() == [True] * 4 + [False] * 4
    for tried in candidates(low, high, off_zero(low, high)):
        change = ChangedInput(conv.name, tried.factor, tried.offset, low, high, True)
        found = changed_error(net, site, [change], errors)
        wanted = _error_of_the_graph(net.graph, silu.name, tried.factor, tried.offset, images, y)
        assert found == pytest.approx(wanted, rel=1e-3)


def _error_of_the_graph(
    graph: fx.GraphModule, silu: str, factor: Tensor, offset: Tensor, images: Tensor, y: Tensor
) -> float:
    """Least squared error over the clipped ranges with 4-bit inputs and 6-bit weights, the convolution run as it is."""
    graph = copy_graph(graph)
    value = next(n for n in graph.graph.nodes if n.name == silu)
    changed = balance(graph, value, 1, [u.name for u in value.users], factor, offset)
    values = Values(graph, images).env
    (conv,) = (n for n in graph.graph.nodes if is_padded(n))
    weight, bias = weight_of(graph, conv)  # type: ignore[misc]
    rows = weight.flatten(1)
    weight = uniform_from_range(rows.amin(1), rows.amax(1), bits=6, scheme="symmetric", signed=True, axis=0)(weight)
    border = values[next(iter(conv.users))] - values[conv] if aten.add.Tensor in {u.target for u in conv.users} else 0
    x, found = values[changed], []
    for shrink in SHRINK:
        bottom, top = x.min() * shrink, x.max() * shrink
        coded = uniform_from_range(bottom, top, bits=4, scheme="asymmetric", signed=False)(x)
        found.append(float((F.conv2d(coded, weight, bias, padding=1) + border - y).square().sum()))
    return min(found)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Identity()], ids=["single_value", "stream"])
def test_channels_off_zero_keep_their_levels_before_padding(activation: nn.Module) -> None:
    net, images = Positive(activation), torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = net(images)
    sqnr = {}
    for even in (False, True):
        options = {"balance": even, "bridges": False}
        model = qhyvit.quantize(net, calib=images, input_size=8, method="qhyvit", bits="w8a8", options=options)
        with torch.no_grad():
            found = model.simulation()(images)
        sqnr[even] = float(10 * torch.log10(wanted.var(0).mean() / (found - wanted).square().mean()))
        if even:
            assert sum("border" in n.name for n in model.graph.graph.nodes) == 1
            with session(model) as runtime:
                difference = runtime.run(images) - found
            assert float(difference.abs().max()) < 1e-2 * float(wanted.abs().max())
    assert sqnr[True] > sqnr[False] + 6  # a bit


def test_in_full_scope_nothing_is_left_to_run() -> None:
    """An operator behind the value would read codes that are too coarse already."""
    net, images = Positive(nn.SiLU()), torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    left = {}
    for scope in ("partial", "full"):
        options = {"method": "qhyvit", "bits": "w8a4", "options": {"bridges": False}}
        model = qhyvit.quantize(net, calib=images, input_size=8, scope=scope, **options)  # type: ignore[arg-type]
        operators = {aten.sub.Tensor, aten.mul.Tensor, aten.add.Tensor}
        left[scope] = sum(n.target in operators for n in model.graph.graph.nodes)
    assert left["partial"] >= 4
    assert left["full"] == 0


class Tokens(nn.Module):
    """A value of four positions whose channels lie apart, read by a layer and by a product."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.embed, self.mix, self.head = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)
        with torch.no_grad():
            self.embed.bias.copy_(torch.linspace(3, 30, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.embed(x))
        mixed, tokens = torch.relu(self.mix(x)).mean((2, 3)), x.flatten(2)
        out: Tensor = self.head(mixed + torch.tanh(tokens @ tokens.transpose(1, 2) / 1e4).mean(2))
        return out


def test_a_shift_of_few_numbers_is_believed_and_products_keep_the_value() -> None:
    """Eight pictures of four tokens are no basis to scale channels by, but a shift takes no reach from any of them."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = qhyvit.quantize(Tokens(), calib=images, input_size=8, method="qhyvit", bits="w8a4")
    nodes = list(model.graph.graph.nodes)
    mix = next(n for n in nodes if n.name.startswith("mix") and n.op == "call_function")
    product = next(n for n in nodes if n.target == aten.matmul.default)
    assert source(mix.args[0]).target == aten.sub.Tensor  # and no factors behind it
    assert all(source(argument).target == aten.gelu.default for argument in product.args)


class PostNorm(nn.Module):
    """Tokens out of a norm, a few channels far above the others, read by a layer and by the addition before a norm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.embed, self.first, self.second = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.LayerNorm(16)
            self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.first.weight.fill_(0.1)
            self.first.bias[:3] = torch.tensor([6.0, 5.0, -7.0])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(self.embed(x).flatten(2).transpose(1, 2))
        out: Tensor = self.head(self.second(tokens + self.down(F.gelu(self.up(tokens)))).mean(1))
        return out


def test_in_full_scope_tokens_behind_a_norm_are_shifted_though_an_addition_reads_them() -> None:
    net, images = PostNorm(), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = net(images)
    sqnr = {}
    for even in (False, True):
        options = {"balance": even, "bridges": False}
        given: dict[str, Any] = {"scope": "full", "bits": "w8a6", "method": "qhyvit", "options": options}
        model = qhyvit.quantize(net, calib=images, input_size=8, **given)
        with torch.no_grad():
            found = model.simulation()(images)
        sqnr[even] = float(10 * torch.log10(wanted.var(0).mean() / (found - wanted).square().mean()))
        sums = [n for n in model.graph.graph.nodes if n.target == aten.add.Tensor]
        assert len(sums) == 1 + even  # the offset comes back behind the addition, before the norm
        with session(model) as runtime:
            assert float((runtime.run(images) - found).abs().max()) < 1e-2 * float(wanted.abs().max())
    assert sqnr[True] > sqnr[False] + 6  # a bit
