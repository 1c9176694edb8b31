"""Bridge blocks: run alone they give what the whole net gives, and the search only lowers their error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.test_qhyvit import problem
from tests.tiny import CLASSES, Tiny
from torch import Tensor, nn

from qhyvit.graph.bridges import find_bridges
from qhyvit.methods.base import Problem
from qhyvit.methods.qhyvit import _spaces, options_of
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import QuantizedModel
from qhyvit.search.blocks import BlockError, BlockSearch, gather_blocks


def case() -> Problem:
    found = problem("w4a4", "simulate")
    found.per_channel = True
    return found


def test_a_block_alone_computes_what_the_quantized_net_computes() -> None:
    net = case()
    parameters, (block,) = set_ranges(net, "minmax"), find_bridges(net.graph)
    (data,) = gather_blocks(net, (block,), "none")
    images = torch.cat(list(net.pictures()))
    inside = set(block.nodes)
    sites = replace(
        net.sites,
        weights=tuple(s for s in net.sites.weights if s.node in block.members),
        activations=tuple(
            replace(s, readers=tuple(r for r in s.readers if r in inside))
            for s in net.sites.activations
            if inside & set(s.readers)
        ),
    )
    simulation = QuantizedModel(net.graph, sites, parameters, net.recipe, {}, False).simulation(integer=False)
    seen: dict[str, torch.Tensor] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Keep(simulation).run(images)
        values = BlockError(net, block, data).run(parameters)
    for name in block.outputs:
        torch.testing.assert_close(values[name], seen[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["none", "fisher"])
def test_the_error_of_a_block_never_rises(source: str) -> None:
    net = case()
    parameters, (block,) = set_ranges(net, "minmax"), find_bridges(net.graph)
    (data,) = gather_blocks(net, (block,), source)  # type: ignore[arg-type]
    error = BlockError(net, block, data)
    start = float(error.error(error.run(parameters)))
    before, after = BlockSearch(error, parameters, _spaces(net, options_of({}))).run()
    assert before == pytest.approx(start)
    assert after < 0.9 * before
    assert float(error.error(error.run(parameters))) == pytest.approx(after)


def test_without_quantizers_the_error_is_zero() -> None:
    net = case()
    (block,) = find_bridges(net.graph)
    (data,) = gather_blocks(net, (block,), "none")
    error = BlockError(net, block, data)
    error.sites, error.members = {}, set()
    assert float(error.error(error.run(set_ranges(net, "minmax")))) < 1e-6


class HalfSeen(Tiny):
    """Attention sees only the first half of the stream's channels; the others, ten times as large, go past it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.qkv.weight[:, 8:] = 0
            self.norm.weight[8:] *= 10


def test_what_goes_past_the_attention_counts_too() -> None:
    left = {}
    for residual_term in (True, False):
        net = problem("w4a4", net=HalfSeen)
        net.per_channel = True
        parameters, (block,) = set_ranges(net, "mse"), find_bridges(net.graph)
        (data,) = gather_blocks(net, (block,), "none")
        (stream,) = (name for name in data.targets if name not in block.outputs)
        error = BlockError(net, block, data, residual_term=residual_term)
        BlockSearch(error, parameters, _spaces(net, options_of({}))).run()
        left[residual_term] = float((error.run(parameters)[stream] - data.targets[stream]).square().sum())
    assert left[True] < 0.5 * left[False]


class ReadTwice(Tiny):
    """What the block's first member reads, another layer reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        seen = nn.functional.silu(self.norm(self.stem(x)))
        x = self.depthwise(seen).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.head(x.mean(1)) + self.beside(seen.flatten(2).transpose(1, 2)).mean(1)
        return out


def test_a_value_that_others_read_too_is_not_the_block_s_to_choose() -> None:
    net = problem("w4a4", net=ReadTwice)
    net.per_channel = True
    parameters, (block,) = set_ranges(net, "minmax"), find_bridges(net.graph)
    (data,) = gather_blocks(net, (block,), "none")
    error = BlockError(net, block, data)
    (shared,) = (s.value for s in error.sites.values() if not set(s.readers) <= set(block.nodes))
    kept, others = parameters.activations[shared], dict(parameters.activations)
    BlockSearch(error, parameters, _spaces(net, options_of({}))).run()
    assert parameters.activations[shared] is kept
    assert any(parameters.activations[name] is not was for name, was in others.items())


class HalfAttended(nn.Module):
    """The channels are split behind the convolution: one half is attended to, the other goes past."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        attended, past = self.mix(nn.functional.silu(self.stem(x))).flatten(2).transpose(1, 2).split(8, -1)
        q, k, v = self.qkv(attended).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = attended + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.head(torch.cat([attended, past], -1).mean(1))
        return out


def test_of_a_split_stream_the_whole_counts() -> None:
    net = problem("w4a4", net=HalfAttended)
    net.per_channel = True
    (block,) = find_bridges(net.graph)
    (data,) = gather_blocks(net, (block,), "none")
    shapes = {tuple(target.shape[1:]) for name, target in data.targets.items() if name not in block.outputs}
    assert (16, 16) in {tuple(sorted(shape)) for shape in shapes}  # 16 positions, all 16 channels
    parameters = set_ranges(net, "minmax")
    before, after = BlockSearch(BlockError(net, block, data), parameters, _spaces(net, options_of({}))).run()
    assert after < before
