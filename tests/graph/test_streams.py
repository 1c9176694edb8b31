"""Streams: which channels are tied together, and that rewriting them leaves the float function alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from identity import difference, pictures
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qhyvit.graph.capture import capture
from qhyvit.graph.streams import Stream, find_streams, rescale_stream, rescale_streams
from qhyvit.quantized import copy_graph

SIZE = (3, 8, 8)


class Net(nn.Module):
    """A function of pictures and layers; `layer("name", ...)` makes each layer when it is first called."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        torch.manual_seed(0)
        with torch.no_grad():
            self(torch.randn(1, *SIZE))
            for parameter in self.parameters():
                nn.init.normal_(parameter, 0, 0.5)

    def layer(self, name: str, make: Callable[[], nn.Module]) -> Any:
        if not hasattr(self, name):
            self.add_module(name, make())
        return getattr(self, name)

    def conv(self, name: str, x: Tensor, out: int, kernel: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        return self.layer(name, lambda: nn.Conv2d(x.shape[1], out, kernel, padding=padding, groups=groups))(x)  # type: ignore[no-any-return]

    def linear(self, name: str, x: Tensor, out: int) -> Tensor:
        return self.layer(name, lambda: nn.Linear(x.shape[-1], out))(x)  # type: ignore[no-any-return]

    def constant(self, name: str, *size: int) -> Tensor:
        if not hasattr(self, name):
            self.register_parameter(name, nn.Parameter(torch.randn(size)))
        return getattr(self, name)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def block(net: Net, name: str, x: Tensor, hidden: int = 6) -> Tensor:
    """Expand, depthwise, squeeze: an inverted residual."""
    h = F.silu(net.conv(f"{name}_expand", x, hidden))
    h = F.silu(net.conv(f"{name}_depthwise", h, hidden, 3, 1, groups=hidden))
    return x + net.conv(f"{name}_squeeze", h, x.shape[1])


def residual(net: Net, x: Tensor) -> Tensor:
    x = net.conv("stem", x, 4)
    x = block(net, "b", block(net, "a", x))
    return net.linear("head", x.mean((2, 3)), 5)


def residual_before_padding(net: Net, x: Tensor) -> Tensor:
    x = net.conv("stem", x, 4)
    x = block(net, "b", block(net, "a", x))
    return net.linear("head", F.silu(net.conv("wide", x, 8, 3, 1)).mean((2, 3)), 5)


def depthwise_and_grouped(net: Net, x: Tensor) -> Tensor:
    x = net.conv("stem", x, 6)
    x = net.conv("depthwise", x, 6, 3, groups=6)
    x = net.conv("grouped", x, 4, 3, groups=2)
    return net.linear("head", x.flatten(1), 5)


def concatenation(net: Net, x: Tensor) -> Tensor:
    a, b = net.conv("left", x, 4), net.conv("right", x, 3)
    joined = torch.cat([a, F.gelu(b), b], 1)
    first, second = net.conv("mix", joined, 6).chunk(2, 1)
    return net.linear("head", torch.cat([first + second, a], 1).mean((2, 3)), 5)


def tokens(net: Net, x: Tensor) -> Tensor:
    x = net.conv("stem", x, 4).flatten(2).transpose(1, 2) + net.constant("position", 1, 64, 4)
    x = torch.cat([net.constant("cls", 1, 1, 4).expand(x.shape[0], -1, -1), x], 1)
    x = x + net.linear("down", F.gelu(net.linear("up", x, 6)), 4)
    return net.linear("head", x[:, 1:].unflatten(1, (8, 8)).mean((1, 2)), 5)


def attention(net: Net, x: Tensor) -> Tensor:
    x = net.layer("norm", lambda: nn.LayerNorm(4))(net.conv("stem", x, 4).flatten(2).transpose(1, 2))
    q, k, v = net.linear("qkv", x, 24).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return net.linear("head", net.linear("out", y, 4).mean(1), 5)


def gates_and_pools(net: Net, x: Tensor) -> Tensor:
    x = net.conv("stem", x, 4)
    y = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) - F.interpolate(F.avg_pool2d(x, 4), scale_factor=2.0, mode="bilinear")
    y = y * torch.sigmoid(net.conv("gate", y.mean((2, 3), keepdim=True), 4))
    return net.linear("head", F.pad(y, (1, 1, 1, 1)).flatten(1), 5)


NETS = [residual, residual_before_padding, depthwise_and_grouped, concatenation, tokens, attention, gates_and_pools]
Case = tuple[Net, fx.GraphModule]


@cache
def captured_once(function: Callable[[Net, Tensor], Tensor]) -> Case:
    net = Net(function).double()
    return net, capture(net, pictures(2, SIZE, torch.float64))


def captured(function: Callable[[Net, Tensor], Tensor]) -> Case:
    """The net and a graph of it that may be changed."""
    net, graph = captured_once(function)
    return net, copy_graph(graph)


def streams_of(function: Callable[[Net, Tensor], Tensor]) -> list[Stream]:
    return find_streams(captured(function)[1])


def modules(graph: fx.GraphModule, ports: tuple[Any, ...]) -> list[str]:
    meta = {n.name: n.meta.get("module") or n.target for n in graph.graph.nodes}
    return [str(meta[port.node]) for port in ports]


def drawn(stream: Stream, seed: int) -> tuple[Stream, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    factor = torch.exp(2 * torch.randn(stream.size, generator=rng, dtype=torch.float64))
    may = stream.shiftable | stream.past_padding
    return stream, factor, 5 * torch.randn(stream.size, generator=rng, dtype=torch.float64) * may


class Inputs(fx.Interpreter):
    """What each node reads first."""

    def __init__(self, graph: fx.GraphModule, x: Tensor) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.run(x)

    def of(self, name: str) -> Tensor:
        (node,) = (n for n in self.module.graph.nodes if n.name == name)  # type: ignore[union-attr]
        return self.env[node.args[0]]  # type: ignore[no-any-return]


# Float identity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", NETS)
def test_all_streams_can_be_rewritten_without_changing_the_output(function: Callable[[Net, Tensor], Tensor]) -> None:
    net, graph = captured(function)
    x = pictures(3, SIZE, torch.float64)
    for seed in range(3):  # on top of each other
        streams = find_streams(graph)
        assert streams
        rescale_streams(graph, [drawn(stream, seed) for stream in streams])
        assert difference(net, graph, x) <= 1e-10


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), which=st.integers(0, 2**32))
@pytest.mark.parametrize("function", [residual, residual_before_padding, tokens])
def test_consumers_read_what_is_promised(function: Callable[[Net, Tensor], Tensor], seed: int, which: int) -> None:
    """One stream alone, by the definition: (value - share · offset) / factor in every consumer's input."""
    net, graph = captured(function)
    streams = find_streams(graph)
    x = pictures(2, SIZE, torch.float64)
    before = Inputs(graph, x)
    stream, factor, offset = drawn(streams[which % len(streams)], seed)
    rescale_stream(graph, stream, factor, offset)
    after = Inputs(graph, x)
    for port in stream.consumers:
        old, new = before.of(port.node), after.of(port.node)
        axis = 1 if old.ndim == 4 else old.ndim - 1
        for channel, (k, share) in enumerate(zip(port.channels.tolist(), port.share.tolist(), strict=True)):
            a, b = old.select(axis, channel), new.select(axis, channel)
            wanted = a if k < 0 else (a - share * offset[k]) / factor[k]
            assert torch.allclose(b, wanted, rtol=1e-8, atol=1e-8 * float(1 + wanted.abs().max()))
    assert difference(net, graph, x) <= 1e-10


@settings(max_examples=8, deadline=None)
@example(steps=[("d", 0, 0), ("d", 0, 0)])  # two padded readers: nothing may enter, to the last bit
@given(steps=st.lists(st.tuples(st.sampled_from("ardpcsglm"), st.integers(0, 9), st.integers(0, 9)), max_size=7))
def test_random_nets(steps: list[tuple[str, int, int]]) -> None:
    """Whatever is found in a net put together at random, changing it is exact."""

    def function(net: Net, x: Tensor) -> Tensor:
        values = [net.conv("stem", x, 4), net.conv("other", x, 4)]
        for i, (kind, a, b) in enumerate(steps):
            one, two = values[a % len(values)], values[b % len(values)]
            new = {
                "a": lambda one=one, two=two: one + two,
                "r": lambda one=one: F.relu(one),
                "d": lambda one=one, i=i: net.conv(f"depthwise_{i}", one, 4, 3, 1, groups=4),
                "p": lambda one=one, i=i: net.conv(f"pointwise_{i}", one, 4),
                "c": lambda one=one, two=two, i=i: net.conv(f"joined_{i}", torch.cat([one, two], 1), 4),
                "s": lambda one=one, two=two: torch.cat([one.chunk(2, 1)[1], two.chunk(2, 1)[0]], 1),
                "g": lambda one=one, two=two: one * two,
                "l": lambda one=one, i=i: net.layer(f"norm_{i}", lambda: nn.GroupNorm(1, 4))(one),
                "m": lambda one=one: one - one.mean((2, 3), keepdim=True),
            }[kind]()
            values.append(new)
        return net.linear("head", torch.cat([v.mean((2, 3)) for v in values], 1), 3)

    net, graph = captured(function)
    for relu in (False, True):
        rescale_streams(graph, [drawn(stream, len(steps)) for stream in find_streams(graph, relu=relu)])
        assert difference(net, graph, pictures(2, SIZE, torch.float64)) <= 1e-8


# What is found --------------------------------------------------------------------------------------------------------


def test_a_residual_stream_is_one() -> None:
    _, graph = captured(residual)
    (stream,) = find_streams(graph)
    assert modules(graph, stream.producers) == ["stem", "a_squeeze", "b_squeeze"]
    assert modules(graph, stream.consumers) == ["a_expand", "b_expand", "head"]
    assert stream.size == 4
    for port in (*stream.producers, *stream.consumers):
        assert port.channels.tolist() == [0, 1, 2, 3]
    assert bool(stream.shiftable.all())


def test_an_offset_that_may_not_reach_padding_is_taken_away_by_the_last_block() -> None:
    _, graph = captured(residual_before_padding)
    (stream,) = find_streams(graph)
    shares = dict(zip(modules(graph, stream.consumers), (p.share for p in stream.consumers), strict=True))
    assert bool(stream.shiftable.all())
    assert torch.equal(shares["wide"], torch.zeros(4).double())
    assert torch.equal(shares["a_expand"], torch.ones(4).double())
    assert torch.equal(shares["b_expand"], torch.ones(4).double())
    assert torch.stack([p.share for p in stream.producers]).tolist() == [[1] * 4, [0] * 4, [-1] * 4]


def test_channels_are_followed_through_concatenation_and_splits() -> None:
    """ "left" is read by both joins; an activation reads "right"; the halves of "mix" are added to each other."""
    _, graph = captured(concatenation)
    (stream,) = find_streams(graph)
    assert modules(graph, stream.producers) == ["left", "mix"]
    assert modules(graph, stream.consumers) == ["mix", "head"]
    assert [p.channels.tolist() for p in stream.producers] == [[0, 1, 2, 3], [4, 5, 6, 4, 5, 6]]
    assert [p.channels.tolist() for p in stream.consumers] == [[0, 1, 2, 3] + [-1] * 6, [4, 5, 6, 0, 1, 2, 3]]


def test_value_channels_of_attention_are_a_stream_and_queries_are_not() -> None:
    _, graph = captured(attention)
    found = {modules(graph, s.producers)[0]: s for s in find_streams(graph)}
    assert set(found) == {"norm", "qkv", "out"}
    (qkv,) = found["qkv"].producers
    assert qkv.channels.tolist() == [-1] * 16 + list(range(8))
    assert bool(found["qkv"].shiftable.all())  # attention weights sum to 1
    assert modules(graph, found["qkv"].consumers) == ["out"]


def test_constants_of_a_token_stream_are_producers() -> None:
    _, graph = captured(tokens)
    (stream,) = find_streams(graph)
    names = modules(graph, stream.producers)
    assert {"stem", "down"} <= set(names)
    assert len(names) == 4  # and the position table and the class token
    table = next(p for p in stream.producers if p.channels.ndim == 3 and p.channels.shape[1] == 64)
    assert table.channels.tolist() == [[[0, 1, 2, 3]] * 64]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda net, x: F.silu(x).mean((2, 3)),
        lambda net, x: net.layer("norm", lambda: nn.LayerNorm(4))(x.flatten(2).transpose(1, 2)).mean(1),
        lambda net, x: x.mean((2, 3)) * x.mean((2, 3)),
        lambda net, x: x.amax(1).flatten(1)[:, :4],
        lambda net, x: x.mean((2, 3)) + 1.0,
    ],
    ids=["activation", "layer_norm", "square", "over_channels", "plain_number"],
)
def test_a_stream_that_anything_else_reads_is_left_out(spoil: Callable[[Net, Tensor], Tensor]) -> None:
    def function(net: Net, x: Tensor) -> Tensor:
        x = net.conv("stem", x, 4)
        return net.linear("read", x.mean((2, 3)), 4) + spoil(net, x)

    _, graph = captured(function)
    assert all("stem" not in modules(graph, s.producers) for s in find_streams(graph))


def test_the_channels_that_nothing_else_reads_are_still_free() -> None:
    def function(net: Net, x: Tensor) -> Tensor:
        x = net.conv("stem", x, 4)
        return net.linear("read", x.mean((2, 3)), 2) + F.silu(x[:, 1:3].mean((2, 3)))

    _, graph = captured(function)
    (stream,) = find_streams(graph)
    assert stream.producers[0].channels.tolist() == stream.consumers[0].channels.tolist() == [0, -1, -1, 1]


def test_the_logits_stay_as_they_are() -> None:
    """The stem is read by the head, but its channels are in the output too."""
    assert streams_of(lambda net, x: net.conv("only", x, 5).mean((2, 3))) == []


def test_relu_passes_factors_where_asked_but_never_offsets() -> None:
    def function(net: Net, x: Tensor) -> Tensor:
        return net.linear("head", F.relu(net.conv("stem", x, 4)).mean((2, 3)), 5)

    _, graph = captured(function)
    assert find_streams(graph) == []
    (stream,) = find_streams(graph, relu=True)
    assert not bool(stream.shiftable.any())


def padded_chain(net: Net, x: Tensor) -> Tensor:
    return net.linear("head", net.conv("b", net.conv("a", x, 4), 4, 3, 1).flatten(1), 5)


def test_an_offset_before_padding_leaves_one_addition_however_often_it_is_changed() -> None:
    net, graph = captured(padded_chain)
    for _ in range(2):
        padded = next(s for s in find_streams(graph) if modules(graph, s.producers) == ["a"])
        assert not bool(padded.shiftable.any())
        assert bool(padded.past_padding.all())
        rescale_stream(graph, padded, torch.ones(4), torch.arange(4.0))
        assert difference(net, graph, pictures(2, SIZE, torch.float64)) <= 1e-12
        (added,) = (n for n in graph.graph.nodes if n.target == torch.ops.aten.add.Tensor)
        border = graph.get_buffer(added.args[1].target)
        assert bool((border[:, 1:-1, 1:-1] == 0).all())  # the same pictures' inside needs none
        assert bool((border[:, 0] != 0).all())


def test_an_offset_does_not_pass_relu() -> None:
    _, graph = captured(lambda net, x: net.linear("head", F.relu(net.conv("a", x, 4)).mean((2, 3)), 5))
    (stream,) = find_streams(graph, relu=True)
    with pytest.raises(ValueError, match="cannot be shifted"):
        rescale_stream(graph, stream, torch.ones(4), torch.ones(4))


@pytest.mark.parametrize(
    ("factor", "offset"),
    [
        (torch.tensor([1.0, 1, 1, 0]), None),
        (torch.tensor([1.0, 1, 1, -2]), None),
        (torch.ones(3), None),
        (torch.ones(4), torch.ones(3)),
        (torch.tensor([1.0, 1, 1, torch.inf]), None),
        (torch.ones(4), torch.tensor([0.0, 0, torch.nan, 0])),
    ],
)
def test_impossible_factors_and_offsets_are_refused_before_anything_changes(
    factor: Tensor, offset: Tensor | None
) -> None:
    net, graph = captured(residual)
    with pytest.raises(ValueError, match="must be"):
        rescale_stream(graph, find_streams(graph)[0], factor, offset)
    assert difference(net, graph, pictures(2, SIZE, torch.float64)) <= 1e-10
