"""The normalising passes, in order. Each leaves the float output unchanged; a test shows it for each."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from qhyvit.graph import shapes
from qhyvit.graph.affine import fold_affines
from qhyvit.graph.attention import open_attention
from qhyvit.graph.batchnorm import plain_batch_norms
from qhyvit.graph.canonical import canonicalise, name_nodes, remove_identities
from qhyvit.graph.constants import fold_constants
from qhyvit.graph.merging import merge_branches
from qhyvit.graph.ops import tidy

Pass = Callable[[fx.GraphModule], int]

# A pass takes a graph with shapes, changes it in place and returns how many changes it made.
PASSES: tuple[Pass, ...] = (
    canonicalise,
    remove_identities,
    fold_constants,
    open_attention,
    plain_batch_norms,
    fold_affines,
    merge_branches,
)


def normalise(graph: fx.GraphModule, example: Tensor) -> dict[str, int]:
    """Run all passes until nothing changes, then name the nodes after their modules.

    Args:
        graph: a captured graph, changed in place.
        example: one picture (1, 3, H, W).

    Returns:
        How many changes each pass made.
    """
    counts = {p.__name__: 0 for p in PASSES}
    shapes.infer(graph, example)
    changed = True
    while changed:
        changed = False
        for one in PASSES:
            done = one(graph)
            if done:
                tidy(graph)
                shapes.infer(graph, example)
                counts[one.__name__] += done
                changed = True
    name_nodes(graph)
    return counts
