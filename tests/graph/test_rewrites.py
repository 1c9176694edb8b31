"""Rare operators are written with common ones, and compute the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from identity import captured, kinds
from torch import Tensor, nn
from torch.nn import functional as F

INDEX, MORE = torch.tensor([2, 0, 7, 7]), torch.tensor([[1], [3], [-1], [0]])


def _assign(x: Tensor, where: tuple[slice | int, ...], value: Tensor) -> Tensor:
    x = x * 1.5
    x[where] = value
    return x


# What the operator becomes: these kinds are gone, and no others than those named are there (beside constants).
LAYOUT = {"reshape", "permute", "transpose", "unsqueeze", "expand", "slice", "index_select", "cat", "getitem"}
CASES: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "add with alpha": (lambda x: torch.add(x, x.sigmoid(), alpha=0.5), {"add", "mul", "sigmoid"}),
    "add a number with alpha": (lambda x: torch.add(x, 2, alpha=3).sigmoid(), {"add", "sigmoid"}),
    "first picture": (lambda x: x + x[:1], {"add", "slice"}),
    "sub with alpha": (lambda x: torch.sub(x, x.sigmoid(), alpha=3), {"sub", "mul", "sigmoid"}),
    "rsub": (lambda x: torch.rsub(x, 2.5), {"sub"}),
    "number minus tensor": (lambda x: 1 - x, {"sub"}),
    "addcmul": (lambda x: torch.addcmul(x, x.sigmoid(), x.tanh(), value=0.3), {"add", "mul", "sigmoid", "tanh"}),
    "baddbmm": (
        lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2], beta=0.5, alpha=0.7),
        {"select", "matmul", "mul", "add"},
    ),
    "bmm": (lambda x: torch.bmm(x[:, 0], x[:, 1]), {"select", "matmul"}),
    "einsum": (lambda x: torch.einsum("nchw,nchv->ncwv", x, x), {"matmul", "permute", "reshape", "unsqueeze"}),
    "var_mean": (lambda x: torch.cat(torch.var_mean(x, [2, 3], correction=0), 1), {"var", "mean", "cat"}),
    "max over an axis": (lambda x: x.max(2).values, {"amax"}),
    "min over an axis": (lambda x: x.min(2, keepdim=True)[0], {"amin"}),
    "instance norm": (lambda x: F.instance_norm(x), {"group_norm"}),
    "layer norm": (lambda x: torch.native_layer_norm(x, [8], None, None, 1e-5)[0], {"layer_norm"}),
    "max pooling with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], {"max_pool2d"}),
    "adaptive max pooling": (lambda x: F.adaptive_max_pool2d(x, (3, 5)), {"amax", *LAYOUT}),
    "adaptive max pooling, even": (lambda x: F.adaptive_max_pool2d(x, 4), {"amax", *LAYOUT}),
    "assignment to a slice": (lambda x: _assign(x, (slice(None), slice(1, 2)), x[:, :1]), {"mul", *LAYOUT}),
    "assignment to the rest": (lambda x: _assign(x, (slice(None), slice(1, None)), x[:, :2]), {"mul", *LAYOUT}),
    "assignment to all": (lambda x: _assign(x, (slice(None), slice(None)), x.sigmoid()), {"sigmoid"}),
    "assignment to an entry": (
        lambda x: _assign(x, (slice(None), slice(None), -2), x[:, :, 0]),
        {"mul", "select", "where", *LAYOUT},
    ),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 2), LAYOUT),
    "index": (lambda x: x[:, :, INDEX], LAYOUT),
    "index on the last axis": (lambda x: x[..., INDEX], LAYOUT),
    "index with two tensors": (lambda x: x[:, :, INDEX, MORE], LAYOUT),
    "unfold along an axis": (lambda x: x.unfold(2, 4, 2).unfold(3, 3, 1), LAYOUT),
    "unfold of patches": (
        lambda x: F.unfold(x, (3, 2), padding=(1, 0), stride=(2, 1), dilation=(1, 2)),
        {"constant_pad_nd", *LAYOUT},
    ),
    "fold of patches": (
        lambda x: F.fold(x.reshape(-1, 12, 16), (9, 10), (2, 3), padding=(1, 0), stride=(3, 2), dilation=(1, 1)),
        {"conv_transpose2d", *LAYOUT},
    ),
    "channel shuffle": (lambda x: F.channel_shuffle(x.repeat(1, 2, 1, 1), 3), {"repeat", *LAYOUT}),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), LAYOUT),
    "squeeze": (lambda x: x.mean((2, 3), keepdim=True).squeeze(), {"mean", "squeeze"}),
    "view of the batch": (lambda x: x.view(-1, 8).view(x.shape[0], 3, -1), {"reshape"}),
    "unflatten": (lambda x: x.unflatten(2, (2, 4)).flatten(1, 2), LAYOUT),
    "movedim and swapaxes": (lambda x: x.movedim(1, -1).swapaxes(1, 2), LAYOUT),
    "type_as": (lambda x: x.sigmoid().type_as(x), {"sigmoid"}),
    "glu": (lambda x: F.glu(x), {"split_with_sizes", "slice", "sigmoid", "mul", "getitem"}),
    "masked fill": (lambda x: x.masked_fill(x > 0.5, -2.0), {"gt", "where"}),
    "std": (lambda x: x.std((2, 3), unbiased=False), {"var", "sqrt"}),
    "even kernel, same padding": (
        lambda x: F.conv2d(x, torch.ones(4, 3, 4, 2, dtype=x.dtype), padding="same", dilation=(1, 1)),
        {"constant_pad_nd", "conv2d"},
    ),
    "odd kernel, same padding": (
        lambda x: F.conv2d(x, torch.ones(4, 3, 3, 5, dtype=x.dtype), padding="same", dilation=2),
        {"conv2d"},
    ),
    "valid padding": (lambda x: F.conv2d(x, torch.ones(4, 3, 3, 5, dtype=x.dtype), padding="valid"), {"conv2d"}),
    "constant linear": (lambda x: x.flatten(1) @ torch.ones(192, 3, dtype=x.dtype), {"reshape", "linear"}),
}


@pytest.mark.parametrize("name", CASES)
def test_rewrite(name: str) -> None:
    function, allowed = CASES[name]

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    graph = captured(Net())
    assert set(kinds(graph)) <= allowed, kinds(graph)
