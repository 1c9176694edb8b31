"""Streams evened out: the float net stays the same, and what a twin was stressed by is undone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qhyvit.graph.capture import capture
from qhyvit.graph.sites import Sites, place
from qhyvit.methods.base import Problem
from qhyvit.recipe import Recipe
from qhyvit.search.equalising import equalise_streams
from qhyvit.search.gather import gather
from qhyvit.search.layers import layer_errors


class Residual(nn.Module):
    """Two linear bottlenecks on one residual stream, whose channels are spread over some decades."""

    def __init__(self, decades: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4)
            self.wide = nn.ModuleList(nn.Conv2d(8, 16, 1) for _ in range(2))
            self.narrow = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(2))
        spread = torch.logspace(-decades / 2, decades / 2, 8)
        with torch.no_grad():
            for layer in (self.stem, *self.narrow):
                layer.weight.mul_(spread.view(-1, 1, 1, 1))  # type: ignore[union-attr,operator]
                layer.bias.mul_(spread)  # type: ignore[union-attr,operator]
            for layer in self.wide:
                layer.weight.div_(spread.view(1, -1, 1, 1))  # type: ignore[union-attr,operator]
            self.head.weight.div_(spread)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(torch.nn.functional.silu(wide(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.mark.parametrize("decades", [3, 6, 8])
def test_a_spread_stream_is_evened_out_and_the_float_net_is_the_same(decades: int) -> None:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    graph = capture(Residual(decades), images)

    def find(captured: torch.fx.GraphModule) -> Sites:
        return place(captured, quantized_outputs=frozenset({"conv"}))

    net = Problem(graph, find(graph), Recipe(bits="w8a8"), lambda: iter(images.split(4)), len(images), find, True)
    with torch.no_grad():
        before = graph(images)
    assert _spread(net) > 10**decades
    samples = gather(net, "none", 256, only_layers=True)
    assert equalise_streams(net, samples, layer_errors(net.graph, samples)) == 1
    with torch.no_grad():
        torch.testing.assert_close(net.graph(images), before, rtol=1e-4, atol=1e-4)
    assert _spread(net) < 10


def _spread(net: Problem) -> float:
    """Largest channel range over the smallest, of the widest value."""
    found = 1.0
    for site in net.sites.activations:
        s = net.statistics[site.value]
        if s.channel_low is not None and s.channel_high is not None and len(s.channel_low) == 8:
            ranges = s.channel_high - s.channel_low
            found = max(found, float(ranges.max() / ranges.min()))
    return found
