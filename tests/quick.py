"""Capturing a net takes most of a small test's time, and always gives the same graph: here it is done once for each.

For tests of what comes after, whose nets are made with fixed seeds: `from quick import captured_once`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor, fx, nn

from qhyvit import pipeline
from qhyvit.graph.capture import capture
from qhyvit.quantized import copy_graph


@pytest.fixture(autouse=True, scope="module")
def captured_once() -> Iterator[None]:
    graphs: dict[type[nn.Module], fx.GraphModule] = {}

    def again(module: nn.Module, example: Tensor) -> fx.GraphModule:
        kind = type(module)
        if kind not in graphs:
            graphs[kind] = capture(module, example)
        return copy_graph(graphs[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "capture", again)
        yield
