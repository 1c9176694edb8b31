"""Channels are followed through layout changes, and nothing is folded where they are read elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from identity import captured, kinds, pictures
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qhyvit.graph.capture import capture
from qhyvit.graph.channels import channel_indices, consumers, origin, per_channel


class Net(nn.Module):
    """A linear to six channels over 8 positions, and what a test does with them."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.read = nn.Linear(3, 6), nn.Linear(6, 4)
        self.factor = nn.Parameter(torch.tensor([0.5, 2.0, 3.0, 0.25, 1.5, 7.0]))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.make(x.flatten(2).transpose(1, 2)))


def graph_of(function: Callable[[Net, Tensor], Tensor]) -> fx.GraphModule:
    return captured(Net(function), (3, 2, 4))


def multiplications(function: Callable[[Net, Tensor], Tensor]) -> int:
    return kinds(graph_of(function))["mul"]


def test_a_factor_goes_up_through_heads() -> None:
    """(n, 8, 6) → (3, n, 2, 8, 1) → the second third, scaled for each head by itself."""

    def split(net: Net, y: Tensor) -> Tensor:
        q, k, v = y.reshape(-1, 8, 3, 2, 1).permute(2, 0, 3, 1, 4)
        k = k * net.factor[:2].reshape(2, 1, 1)
        return torch.cat([F.silu(q), F.relu(k), v], -1).mean(2).flatten(1)

    assert multiplications(split) == 0


def test_a_factor_that_differs_within_a_channel_is_not_folded() -> None:
    assert multiplications(lambda net, y: F.relu(y * torch.linspace(1, 2, 8).to(y.dtype)[:, None]).mean(1)) == 1


def test_a_factor_is_not_folded_where_its_channels_are_read_unscaled_too() -> None:
    assert multiplications(lambda net, y: F.relu(y * net.factor).mean(1) + F.silu(y).mean(1)) == 1


def test_a_factor_is_not_folded_where_a_slice_of_its_channels_is_read_elsewhere() -> None:
    def overlapping(net: Net, y: Tensor) -> Tensor:
        return F.relu(y[..., :4] * net.factor[:4]).mean(1) + F.silu(y[..., 2:]).mean(1)

    def apart(net: Net, y: Tensor) -> Tensor:
        return F.relu(y[..., :3] * net.factor[:3]).mean(1) + F.silu(y[..., 3:]).mean(1)

    assert multiplications(overlapping) == 1
    assert multiplications(apart) == 0


def test_a_factor_is_not_folded_into_weights_whose_output_is_the_result_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.cat([y, F.silu(y * 3)], -1).flatten(1)

    assert kinds(captured(Twice()))["mul"] == 1


def test_a_factor_goes_down_into_all_readers_or_none() -> None:
    def all_linear(net: Net, y: Tensor) -> Tensor:
        y = F.relu(y) * net.factor
        return net.read(y).mean(1) + F.silu(net.read(y.mean(1)))

    def one_is_not(net: Net, y: Tensor) -> Tensor:
        y = F.relu(y) * net.factor
        return net.read(y).mean(1) + y.amax((1, 2), keepdim=True)[:, 0]

    assert multiplications(all_linear) == 0
    assert multiplications(one_is_not) == 1


def test_a_factor_does_not_go_down_through_a_mean_over_channels() -> None:
    """The mean of the first three indices is the second index: it must not be taken for that channel."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor, self.read = nn.Parameter(torch.tensor([0.5, 2.0, 3.0])), nn.Linear(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(x) * self.factor.view(3, 1, 1)
            out: Tensor = self.read(y.mean(1).flatten(1).mean(1, keepdim=True))
            return out

    assert kinds(captured(Mixed()))["mul"] == 1


def test_a_factor_does_not_go_down_where_one_input_channel_holds_several() -> None:
    assert multiplications(lambda net, y: net.read((F.relu(y) * net.factor).transpose(1, 2)[..., :6]).mean(1)) == 1


@pytest.mark.parametrize("offset", [False, True])
def test_through_grouped_convolutions(offset: bool) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor, self.read = nn.Parameter(torch.rand(6, 1, 1)), nn.Conv2d(6, 4, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(torch.cat([x, -x], 1))
            y = y + self.factor if offset else y * self.factor
            out: Tensor = self.read(y)
            return out.flatten(1)

    found = kinds(captured(Grouped()))
    assert not found["add"]
    assert not found["mul"]


# The functions themselves ---------------------------------------------------------------------------------------------


def nodes_of(function: Callable[[Net, Tensor], Tensor]) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    graph = capture(Net(function), pictures(2, (3, 2, 4)))
    return graph, {n.name: n for n in graph.graph.nodes}


def test_origin_tells_which_channel_each_number_came_from() -> None:
    graph, nodes = nodes_of(lambda net, y: F.relu(y.transpose(1, 2)[:, 4:].flip(1)).mean(1))
    found = origin(graph, nodes["relu"].args[0])  # type: ignore[arg-type]
    assert found is not None
    producer, index = found
    assert producer.name == "make_linear"
    assert index.shape == (1, 2, 8)
    assert index[0, :, 3].tolist() == [5, 4]


def test_origin_is_unknown_behind_what_computes_and_before_several_readers() -> None:
    graph, nodes = nodes_of(lambda net, y: (F.relu(y) + F.silu(y)).mean(1))
    assert origin(graph, nodes["relu"]) is None
    assert origin(graph, nodes["make_linear"]) is None


def test_consumers_finds_every_reader_and_its_channels() -> None:
    graph, nodes = nodes_of(lambda net, y: net.read(F.relu(y).flip(2)).mean(1) + net.read(F.relu(y).mean(1)))
    found = consumers(graph, nodes["relu"], 2)
    assert found is not None
    assert [index.tolist() for _, index in found] == [[5, 4, 3, 2, 1, 0]]
    assert consumers(graph, nodes["make_linear"], 2) is None


def test_per_channel_reads_a_broadcast_constant() -> None:
    index = channel_indices((2, 3, 4), 1)
    assert per_channel(torch.tensor([[5.0], [6.0], [7.0]]), index, 3, 1.0).tolist() == [5, 6, 7]  # type: ignore[union-attr]
    assert per_channel(torch.tensor(2.0), index[:, :2], 3, 1.0).tolist() == [2, 2, 1]  # type: ignore[union-attr]
    assert per_channel(torch.arange(4.0), index, 3, 1.0) is None
