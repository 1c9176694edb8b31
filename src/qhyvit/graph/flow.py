"""Which value depends on which: ancestors, dominators and bypasses among the values that depend on the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx

from qhyvit.graph.ops import CONVOLUTIONS, WEIGHTED, argument, aten, is_call, shape, weight_of


class Flow:
    """The data flow of one graph. Sets of nodes are integers used as bit sets, bit i for `nodes[i]`.

    Attributes:
        graph: the captured graph, which is not changed.
        nodes: the nodes whose tensors depend on the pictures, in graph order; constants and batch sizes are left out.
        inputs, users: what each of them reads and is read by, among themselves.
        before, after: for each node, itself and all that it depends on, or that depends on it.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.inputs: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.users: dict[fx.Node, list[fx.Node]] = {}
        self.outputs: set[fx.Node] = set()
        for node in graph.graph.nodes:
            read = tuple(dict.fromkeys(n for n in node.all_input_nodes if n in self.inputs))
            if node.op == "output":
                self.outputs = set(read)
            elif node.op == "placeholder" or (read and not is_call(node, aten.sym_size.int)):
                self.inputs[node], self.users[node] = read, []
                for source in read:
                    self.users[source].append(node)
        self.nodes = list(self.inputs)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.before: dict[fx.Node, int] = {}
        self.after: dict[fx.Node, int] = {}
        for node in self.nodes:
            self.before[node] = union(self.before, self.inputs[node]) | self.bit(node)
        for node in reversed(self.nodes):
            self.after[node] = union(self.after, self.users[node]) | self.bit(node)
        self._dominator: dict[fx.Node, fx.Node | None] = {}
        for node in self.nodes:
            self._dominator[node] = self.dominator(self.inputs[node])
        self._layers = {n for n in self.nodes if is_call(n, WEIGHTED) and self._has_weight(n)}

    def bit(self, node: fx.Node) -> int:
        """The set of one node."""
        return 1 << self.position[node]

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """The set of some nodes."""
        return sum(self.bit(node) for node in set(nodes))

    def members(self, bits: int) -> list[fx.Node]:
        """The nodes of a set, in graph order."""
        return [node for i, node in enumerate(self.nodes) if bits >> i & 1]

    def ancestor(self, node: fx.Node, of: fx.Node) -> bool:
        """Whether `of` is another node and depends on `node`."""
        return node is not of and bool(self.before[of] & self.bit(node))

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node is a convolution or linear with constant weights, a factor and offset per channel excepted."""
        return node in self._layers

    def _has_weight(self, node: fx.Node) -> bool:
        found = weight_of(self.graph, node)
        if found is None or not isinstance(argument(node, "input"), fx.Node):
            return False
        return not is_call(node, CONVOLUTIONS) or math.prod(found[0].shape[1:]) > 1

    def kernel(self, layer: fx.Node) -> tuple[int, ...]:
        """Kernel size of a convolution; () for a linear."""
        return shape(argument(layer, "weight"))[2:]

    def is_pointwise(self, layer: fx.Node) -> bool:
        """Whether a layer works on each position by itself."""
        return math.prod(self.kernel(layer)) == 1

    def mixes_channels(self, layer: fx.Node) -> bool:
        """Whether each output channel reads several input channels (a depthwise convolution's reads one)."""
        return shape(argument(layer, "weight"))[1] > 1

    def positions(self, layer: fx.Node) -> int:
        """Positions per picture at a layer's output."""
        return math.prod(shape(layer)) // shape(argument(layer, "weight"))[0]

    def is_elementwise(self, node: fx.Node) -> bool:
        """Whether a node changes each number of its one tensor by itself, as activations do."""
        if len(self.inputs[node]) != 1 or node.op != "call_function" or self.is_layer(node):
            return False
        tags = getattr(node.target, "tags", ())
        return torch.Tag.pointwise in tags or is_call(node, frozenset({aten.hardswish.default, aten.prelu.default}))

    def dominator(self, nodes: Iterable[fx.Node], *, strict: bool = False) -> fx.Node | None:
        """The last node through which all paths to `nodes` lead, with `strict` none of them; None past the input."""
        found: fx.Node | None = None
        for node in nodes:
            found = node if found is None else self._meet(found, node)
        return self._dominator[found] if strict and found is not None else found

    def _meet(self, a: fx.Node, b: fx.Node) -> fx.Node:
        while a is not b:
            if self.position[a] < self.position[b]:
                a, b = b, a
            above = self._dominator[a]
            if above is None:  # a second input of the graph
                return b
            a = above
        return a

    def bypassed(self, node: fx.Node, avoid: int) -> bool:
        """Whether `node` reaches the graph's output on a path without the nodes of a set."""
        pending, seen = [node], {node}
        while pending:
            here = pending.pop()
            if here in self.outputs:
                return True
            for user in self.users[here]:
                if user not in seen and not avoid & self.bit(user):
                    seen.add(user)
                    pending.append(user)
        return False


def union(sets: dict[fx.Node, int], nodes: Iterable[fx.Node]) -> int:
    """All bits of the sets of some nodes."""
    bits = 0
    for node in nodes:
        bits |= sets[node]
    return bits
