"""Where published methods apply, found on the graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hybrid import problem
from qhyvit.graph.ops import aten
from qhyvit.graph.patterns import activation_outputs, folds, fused_parts, norm_inputs, softmax_outputs


def test_norms_before_layers() -> None:
    case = problem()
    found = folds(case.graph, case.sites)
    assert [str(f.producer.target).split(".")[1] for f in found] == ["layer_norm", "layer_norm", "group_norm"]
    assert all(f.shiftable and len(f.layers) == 1 for f in found)


class PostNorm(nn.Module):
    """The norm's output also feeds the residual, as in Mobile-Former's tokens: no fold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.fc = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.flatten(2).transpose(1, 2)))
        out: Tensor = self.head((x + self.fc(x)).mean(1))
        return out


def test_a_norm_that_also_feeds_a_residual_is_left_alone() -> None:
    case = problem(net=PostNorm)
    assert folds(case.graph, case.sites) == []


def test_softmax_and_activations_before_products_and_layers() -> None:
    case = problem()
    ((site, node),) = softmax_outputs(case.graph, case.sites)
    assert node.target == aten.softmax.int
    assert site.value == node.name
    targets = [n.target for _, n in activation_outputs(case.graph, case.sites)]
    assert targets == [aten.silu.default] * 3 + [aten.gelu.default]


@pytest.mark.parametrize(("scope", "count"), [("partial", 0), ("full", 3)])
def test_norm_inputs_exist_where_norms_are_quantized(scope: str, count: int) -> None:
    case = problem(scope=scope)
    assert len(norm_inputs(case.graph, case.sites)) == count


def test_parts_of_a_fused_projection() -> None:
    case = problem()
    nodes = {s.node: next(n for n in case.graph.graph.nodes if n.name == s.node) for s in case.sites.weights}
    parts = {name: fused_parts(node) for name, node in nodes.items()}
    (fused,) = [p for p in parts.values() if len(p) > 1]
    assert [p.tolist() for p in fused] == [list(range(16)), list(range(16, 32)), list(range(32, 48))]


class Interleaved(nn.Module):
    """Queries, keys and values of each head lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x.flatten(2).transpose(1, 2)).unflatten(-1, (2, 6)).transpose(1, 2)
        q, k, v = y.split([2, 2, 2], dim=-1)
        y = torch.softmax(q @ k.transpose(-2, -1), -1) @ v
        out: Tensor = self.head(y.transpose(1, 2).flatten(2).mean(1))
        return out


def test_parts_are_told_by_channel_not_by_position() -> None:
    case = problem(net=Interleaved)
    node = next(n for n in case.graph.graph.nodes if n.name == case.sites.weights[0].node)
    assert [p.tolist() for p in fused_parts(node)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
