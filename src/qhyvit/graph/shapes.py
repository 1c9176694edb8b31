"""Shapes of every value for one picture, recorded on the nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(result.shape), result.dtype
        else:
            n.meta.pop("shape", None)
            if isinstance(result, int):
                n.meta["value"] = result
        return result


def infer(graph: fx.GraphModule, example: Tensor) -> None:
    """Run one picture (1, 3, H, W); write `meta["shape"]` and `meta["dtype"]` of tensors, `meta["value"]` of sizes."""
    with torch.no_grad():
        _Recorder(graph).run(example)


class _Sizes(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.sizes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.sizes[n] = tuple(result.shape)
        return result


def batch_axes(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """The axis of each value that grows with the number of pictures; constants have none."""
    (pictures,) = (n for n in graph.graph.nodes if n.op == "placeholder")
    device = next((buffer.device for buffer in graph.buffers()), torch.device("cpu"))
    runs = []
    for count in (1, 2):
        run = _Sizes(graph)
        size = (count, *pictures.meta["shape"][1:])
        with torch.no_grad():
            run.run(torch.zeros(size, dtype=pictures.meta["dtype"], device=device))
        runs.append(run.sizes)
    one, two = runs
    grown = {node: [i for i, (a, b) in enumerate(zip(one[node], two[node], strict=True)) if a != b] for node in one}
    return {node: axes[0] for node, axes in grown.items() if len(axes) == 1}
