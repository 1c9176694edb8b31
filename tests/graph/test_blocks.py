"""Reconstruction units: they cover the graph, can be run in order, and end where residuals do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from hybrid import SIDE, Hybrid
from qhyvit.graph.blocks import LARGEST, Unit, find_units, whole_transformers
from qhyvit.graph.bridges import find_bridges
from qhyvit.graph.capture import capture
from tiny import Tiny


class Residuals(nn.Module):
    """A stem, two residual blocks inside a longer skip, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.join = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 8, 1)
        self.first = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 1))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        y = x + self.first(x)
        y = y + self.second(y)
        out: Tensor = self.head(self.join(torch.cat([x, y], 1)).mean((2, 3)))
        return out


class TwoStreams(nn.Module):
    """Two streams that feed each other all along, so that no value is ever alive alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(6, 6) for _ in range(20))
        self.b = nn.ModuleList(nn.Linear(6, 6) for _ in range(20))

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)[:, :, :6]
        p, q = x.relu(), x.sigmoid()
        for a, b in zip(self.a, self.b, strict=True):
            p, q = p + a(q), q * b(p)
        return p.flatten(1) + q.flatten(1)


def found(net: nn.Module) -> tuple[fx.GraphModule, tuple[Unit, ...]]:
    graph = capture(net.eval(), torch.zeros(1, 3, SIDE, SIDE))
    return graph, find_units(graph)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("net", [Tiny, Hybrid, Residuals, TwoStreams])
def test_each_node_is_in_one_unit_and_units_can_be_run_in_order(net: type[nn.Module], whole: bool) -> None:
    graph, units = found(net())
    units = whole_transformers(graph, units) if whole else units
    assert sorted(n for u in units for n in u.nodes) == sorted(
        n.name for n in graph.graph.nodes if n.op == "call_function"
    )
    known = {n.name for n in graph.graph.nodes if n.op == "placeholder"}
    for unit in units:
        assert set(unit.inputs) <= known
        known |= set(unit.nodes)
        assert len(unit.layers) <= LARGEST
    assert all(set(u.outputs) <= set(u.nodes) for u in units)
    assert len(units) > 1


def test_units_end_with_residual_blocks_also_inside_a_longer_skip() -> None:
    graph, units = found(Residuals())
    modules = {n.name: n.meta["module"] for n in graph.graph.nodes if n.op == "call_function"}
    layers = [[modules[n] for n in u.layers] for u in units]
    assert ["first.0", "first.2"] in layers
    assert ["second.0", "second.2"] in layers


def test_an_attention_and_its_feed_forward_network_make_one_whole_transformer_block() -> None:
    graph, units = found(Hybrid())
    whole = whole_transformers(graph, units)
    modules = {n.name: n.meta["module"] for n in graph.graph.nodes if n.op == "call_function"}
    layers = [[modules[n] for n in u.layers] for u in units]
    assert ["out"] in layers
    assert ["fc1", "fc2"] in layers
    assert ["out", "fc1", "fc2"] in [[modules[n] for n in u.layers] for u in whole]
    assert len(whole) == len(units) - 1
    assert [u for u in whole if u.bridge] == [u for u in units if u.bridge]


@pytest.mark.parametrize("net", [Residuals, TwoStreams])
def test_residuals_without_attention_stay_apart(net: type[nn.Module]) -> None:
    graph, units = found(net())
    assert whole_transformers(graph, units) == units


@pytest.mark.parametrize("net", [Tiny, Hybrid])
def test_bridge_blocks_are_units_of_their_own(net: type[nn.Module]) -> None:
    graph, units = found(net())
    bridges = find_bridges(graph)
    assert len(bridges) == 1
    assert [set(u.layers) for u in units if u.bridge] == [set(bridges[0].members)]
