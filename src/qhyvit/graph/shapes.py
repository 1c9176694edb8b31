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
