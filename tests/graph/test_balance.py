"""Shifting and scaling channels leaves the float function alone."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from qhyvit.graph.balance import balance, foldable, passage, shiftable
from qhyvit.graph.capture import capture
from qhyvit.graph.ops import argument, aten, constant
from qhyvit.graph.sites import place


class Net(nn.Module):
    """A linear bottleneck, a padded convolution behind an activation, a norm before two linears, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.spatial = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.widen = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.norm, self.left, self.right = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.widen(self.squeeze(self.spatial(torch.nn.functional.silu(self.expand(x)))))
        tokens = x.flatten(2).transpose(1, 2)
        normal = self.norm(tokens)
        return self.head((tokens + self.left(normal) * torch.tanh(self.right(normal))).mean(1))


@pytest.fixture
def case() -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    return capture(Net().double(), x), x


def test_every_input_site_can_be_rewritten_without_changing_the_output(case) -> None:  # type: ignore[no-untyped-def]
    graph, x = case
    before = graph(x)
    folded, explicit = 0, 0
    for site in reversed(place(graph).activations):  # a change may put an addition behind the layers that read it
        node = next(n for n in graph.graph.nodes if n.name == site.value)
        channels = site.shape[site.channel_axis]
        inside = foldable(graph, node, site.channel_axis, site.readers)
        change = torch.rand(channels).double() + 0.1, torch.randn(channels).double()
        out = balance(graph, node, site.channel_axis, site.readers, *change)
        assert (out is node) == inside
        folded, explicit = folded + inside, explicit + (not inside)
    assert folded >= 2  # the linear bottleneck and the norm
    assert explicit >= 2  # behind the activation and at the pictures
    assert torch.allclose(graph(x), before, rtol=1e-10, atol=1e-10)


CONVOLUTIONS = [
    nn.Conv2d(6, 4, 3, padding=1),
    nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
    nn.Conv2d(6, 8, (5, 3), stride=2, padding=(2, 0), groups=2),
    nn.Conv2d(6, 3, 3, padding=2, dilation=2),
    nn.Conv2d(6, 3, 3, padding="same"),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_an_offset_is_exact_before_zero_padding_too(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    graph = capture(nn.Sequential(nn.Conv2d(3, 6, 1), nn.SiLU(), conv).double(), x)
    before = graph(x)
    silu = next(n for n in graph.graph.nodes if n.target == aten.silu.default)
    readers = [u.name for u in silu.users]
    assert not shiftable(graph, silu, 1, readers)
    balance(graph, silu, 1, readers, torch.rand(6).double() + 0.1, torch.randn(6).double())
    assert torch.allclose(graph(x), before, rtol=1e-10, atol=1e-10)


class PostNorm(nn.Module):
    """Tokens out of a norm, read by a linear, as attention's keys and values, and by the addition before a norm."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.query, self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.first(x.flatten(2).transpose(1, 2))
        heads = tokens.unflatten(2, (2, 4)).transpose(1, 2)
        query = self.query(tokens).unflatten(2, (2, 4)).transpose(1, 2)
        if self.kind == "both read":
            query = heads
        weights = (query @ heads.transpose(2, 3)).softmax(2 if self.kind == "other axis" else 3)
        total = tokens + self.mix((weights @ heads).transpose(1, 2).flatten(2))
        out: torch.Tensor = self.head(self.second(total))
        return out + self.head(total) if self.kind == "sum read" else out


def post_norm(kind: str = "") -> tuple[fx.GraphModule, torch.Tensor, fx.Node, tuple[str, ...]]:
    """The graph, pictures, the first norm and those of its readers that are linears."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    graph = capture(PostNorm(kind).double(), x)
    norm = next(n for n in graph.graph.nodes if n.target == aten.layer_norm.default)
    return graph, x, norm, tuple(u.name for u in norm.users if u.target == aten.linear.default)


def test_an_offset_passes_through_attention_and_the_addition_before_the_next_norm() -> None:
    graph, x, norm, linears = post_norm()
    before, beside = graph(x), passage(graph, norm, 2, linears)
    assert not foldable(graph, norm, 2, linears)
    (total,) = beside.sums
    assert beside.attention
    offset = torch.randn(8).double()
    assert balance(graph, norm, 2, linears, torch.ones(8).double(), offset, beside) is norm
    assert torch.allclose(graph(x), before, rtol=1e-10, atol=1e-10)
    assert torch.allclose(constant(graph, argument(norm, "bias")), -offset)
    (moved,) = total.users
    names = {s.value for s in place(graph, scope="full").activations}
    assert total.name in names  # as codes around 0
    assert moved.name not in names  # the next norm adds the offset to them


@pytest.mark.parametrize("kind", ["sum read", "other axis", "both read"])
def test_no_offset_passes_where_it_would_change_something(kind: str) -> None:
    """The sum goes on, weights that a value is mixed with do not add up to 1, or keys are queries too."""
    graph, _, norm, linears = post_norm(kind)
    assert not passage(graph, norm, 2, linears)


def test_a_value_that_something_else_reads_keeps_its_float_form_there(case) -> None:  # type: ignore[no-untyped-def]
    graph, _ = case
    tanh = next(n for n in graph.graph.nodes if n.target == aten.tanh.default)
    with pytest.raises(ValueError, match="cannot be balanced"):
        balance(graph, tanh, 2, [u.name for u in tanh.users], torch.ones(8).double(), torch.zeros(8).double())
