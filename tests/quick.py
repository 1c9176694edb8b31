"""What keeps small tests quick."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, fx, nn

from qhyvit import pipeline
from qhyvit.graph.capture import capture
from qhyvit.quantized import copy_graph


@pytest.fixture(autouse=True, scope="module")
def captured_once() -> Iterator[None]:
    """Capturing a net takes most of a small test's time, and always gives the same graph: here it is done once each.

    For tests of what comes after, whose nets are made with fixed seeds; importing it is enough.
    """
    graphs: dict[type[nn.Module], fx.GraphModule] = {}

    def again(module: nn.Module, example: Tensor) -> fx.GraphModule:
        kind = type(module)
        if kind not in graphs:
            graphs[kind] = capture(module, example)
        return copy_graph(graphs[kind])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "capture", again)
        yield


def ranges_only(changes: dict[str, Any]) -> dict[str, Any]:
    """Recipe keys, with method mse where they ask for none: the default one searches, which takes seconds."""
    return changes if changes.keys() & {"method", "recipe"} else {"method": "mse", **changes}
