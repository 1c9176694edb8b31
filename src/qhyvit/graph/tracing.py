"""Which numbers of a net must be scaled together: channels followed through everything that is linear in them.

Every value of the graph gets an *index tensor*, in its shape for one picture, that holds for each number the id of a
channel. Layers, norms and constants make new ids, one for each output channel or number; linear operators hand them
on; an addition says that two ids are one. Id 0 stands for what may not be changed: the pictures, the logits, whatever
an activation function or a norm reads. (`qhyvit.graph.channels` follows one value forward, this all of them at once.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.graph.affine import is_padded
from qhyvit.graph.ops import LAYOUT, WEIGHTED, argument, aten, channel_axis, constant, is_call, shape, weight_of
from qhyvit.graph.tracing_rules import ADDITIONS, FIXED, Step, along, rule_of, unspread

NORMS = frozenset({aten.layer_norm.default, aten.group_norm.default})
_DATA = LAYOUT | ADDITIONS | frozenset({aten.cat.default})  # what may read a constant that is to be changed


@dataclass(frozen=True)
class End:
    """A producer or consumer: a node, the ids of its output channels (or of a constant's numbers) or input channels.

    Attributes:
        node: the producer or consumer.
        ids: (C,), of a constant in its shape.
        source: the value that a consumer reads.
        padded: whether a consumer reads zeros from outside.
    """

    node: fx.Node
    ids: Tensor
    source: fx.Node | None = None
    padded: bool = False


class Trace:
    """All channels of a graph, which is not changed.

    Args:
        graph: a captured graph.
        relu: whether to follow channels through ReLU, which commutes with positive factors, but not with offsets.

    Attributes:
        steps: by node, for all that hand numbers on.
        producers, consumers: in graph order.
    """

    def __init__(self, graph: fx.GraphModule, *, relu: bool = False) -> None:
        self.graph, self.relu = graph, relu
        self.steps: dict[fx.Node, Step] = {}
        self.producers: list[End] = []
        self.consumers: list[End] = []
        self._index: dict[fx.Node, Any] = {}
        self._parent = [FIXED]
        for node in graph.graph.nodes:
            if node.op in {"call_function", "output"}:
                self._visit(node)

    def roots(self) -> Tensor:
        """For each id the one that stands for all that are joined with it, int64."""
        return torch.tensor([self._find(i) for i in range(len(self._parent))])

    def index(self, node: fx.Node) -> Any:
        """Ids of a value: a tensor, or several for an operator with several outputs."""
        if node not in self._index:
            self._index[node] = self._ids_of_constant(node)
        return self._index[node]

    def fresh(self, count: int) -> Tensor:
        """New ids (count,)."""
        first = len(self._parent)
        self._parent += range(first, first + count)
        return torch.arange(first, first + count)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Say that numbers at the same place are of one channel."""
        left, right = unspread(a), unspread(b)
        whole = left * 0 + right * 0
        count = len(self._parent)
        pairs = (left + whole) * count + right + whole  # one number for each: rows are slow to tell apart
        for pair in torch.unique(pairs).tolist():
            low, high = sorted(map(self._find, divmod(pair, count)))
            self._parent[high] = low

    def fix(self, ids: Any) -> None:
        """Say that these may not be changed."""
        for tensor in ids if isinstance(ids, tuple | list) else (ids,):
            self.join(tensor, torch.zeros((), dtype=torch.int64))

    def _find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def _ids_of_constant(self, node: fx.Node) -> Tensor:
        value, readers = constant(self.graph, node), list(node.users)
        if value is None or not value.is_floating_point() or len(readers) != 1 or not is_call(readers[0], _DATA):
            return torch.zeros((), dtype=torch.int64).expand(node.meta.get("shape", ()))
        ids = self.fresh(value.numel()).view(value.shape)
        self.producers.append(End(node, ids))
        return ids

    def _visit(self, node: fx.Node) -> None:
        if is_call(node, WEIGHTED) and weight_of(self.graph, node) is not None:
            self._visit_layer(node)
            return
        if is_call(node, NORMS) and (axis := self._norm_axis(node)) is not None:
            self.fix(self.index(node.args[0]))  # type: ignore[arg-type]
            self._produce(node, axis)
            return
        rule = None if node.op == "output" else rule_of(node, self.relu)
        step = None if rule is None else rule(self, node)
        if step is not None:
            self.steps[node], self._index[node] = step, step.index
            return
        for source in node.all_input_nodes:
            if source.op != "get_attr" or source in self._index:
                self.fix(self.index(source))
        self._index[node] = torch.zeros((), dtype=torch.int64).expand(node.meta.get("shape", ()))

    def _visit_layer(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        ids = self.index(source)
        axis = ids.ndim - 1 if node.target == aten.linear.default else 1
        read = along(self, ids, [i for i in range(ids.ndim) if i != axis])
        self.consumers.append(End(node, read.flatten(), source, is_padded(node)))
        self._produce(node, channel_axis(node))

    def _produce(self, node: fx.Node, axis: int) -> None:
        size = shape(node)
        ids = self.fresh(size[axis])
        self.producers.append(End(node, ids))
        view = [1] * len(size)
        view[axis] = -1
        self._index[node] = ids.view(view).expand(size)

    def _norm_axis(self, node: fx.Node) -> int | None:
        """The channel axis of a norm with constant factors and offsets."""
        given = [argument(node, name) for name in ("weight", "bias")]
        if any(g is not None and constant(self.graph, g) is None for g in given):
            return None
        if node.target == aten.group_norm.default:
            return 1
        return len(shape(node)) - 1 if len(argument(node, "normalized_shape")) == 1 else None
