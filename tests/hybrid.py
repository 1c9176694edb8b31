"""A small net with all that published methods look for: norms before layers, softmax, GELU and SiLU before layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qhyvit.graph.capture import capture
from qhyvit.graph.sites import Sites, place
from qhyvit.methods import Problem
from qhyvit.quantized import copy_graph
from qhyvit.recipe import Recipe
from qhyvit.targets import TARGETS

SIDE, CLASSES, WIDTH = 16, 7, 16


class Hybrid(nn.Module):
    """An inverted residual, a transformer block with LayerNorm, and a 1×1 convolution behind a GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.stem = nn.Conv2d(3, WIDTH, 3, 2, 1)
            self.expand = nn.Conv2d(WIDTH, 32, 1)
            self.depthwise = nn.Conv2d(32, 32, 3, 2, 1, groups=32)
            self.project = nn.Conv2d(32, WIDTH, 1)
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.fc1, self.fc2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
            self.group_norm, self.last = nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, 24, 1)
            self.head = nn.Linear(24, CLASSES)
            for norm in (self.norm1, self.norm2, self.group_norm):
                nn.init.uniform_(norm.weight, 0.1, 4)  # channels of different ranges and offsets
                nn.init.normal_(norm.bias, 0, 1)
            nn.init.normal_(self.qkv.weight, 0, 0.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        x = nn.functional.silu(self.depthwise(nn.functional.silu(self.expand(x))))
        x = self.project(x)
        size = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        x = x.transpose(1, 2).unflatten(2, size)
        x = self.last(self.group_norm(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


_GRAPHS: dict[type[nn.Module], fx.GraphModule] = {}


def problem(
    bits: str = "w4a4",
    *,
    net: type[nn.Module] = Hybrid,
    target: str = "simulate",
    scope: str = "partial",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Problem:
    """The net with 8 noise pictures, as a method is given it; the graph is a copy."""
    images = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(dtype)
    if net not in _GRAPHS:
        _GRAPHS[net] = capture(net(), torch.zeros(1, 3, SIDE, SIDE))
    graph = copy_graph(_GRAPHS[net]).to(dtype)

    def find(captured: fx.GraphModule) -> Sites:
        return place(captured, scope=scope, quantized_outputs=TARGETS[target].quantized_outputs)

    recipe = TARGETS[target].prepare(Recipe(bits=bits, target=target, scope=scope, options=options))
    return Problem(graph, find(graph), recipe, lambda: iter(images.split(4)), len(images), find)


def logits(case: Problem) -> Tensor:
    """The float output on the calibration pictures."""
    with torch.no_grad():
        return torch.cat([case.graph(images) for images in case.pictures()])
