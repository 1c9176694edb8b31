"""What linear operators do to the channels of what they read: the rules of `qhyvit.graph.tracing`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qhyvit.graph.ops import LAYOUT, argument, as_list, aten, constant, is_call, shape

FIXED = 0  # the id of all that may not be changed
ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor})


@dataclass(frozen=True)
class Step:
    """How one operator hands numbers on.

    Attributes:
        index: ids of its output.
        sources: the values that it adds, with their signs, or puts side by side, or the one that it passes on.
        joins: whether it puts them side by side.
        keeps_offset: whether an offset of the source is the same offset of the output.
    """

    index: Any
    sources: tuple[tuple[fx.Node, int], ...]
    joins: bool = False
    keeps_offset: bool = True


class Channels(Protocol):
    """What a rule asks of the trace."""

    graph: fx.GraphModule

    def index(self, node: fx.Node) -> Any:
        """Ids of a value: a tensor, or several for an operator with several outputs."""

    def join(self, a: Tensor, b: Tensor) -> None:
        """Say that numbers at the same place are of one channel."""


# None where the operator is not linear in its channels, so that they must stay as they are
Rule = Callable[[Channels, fx.Node], Step | None]


def unspread(index: Tensor) -> Tensor:
    """Without the repetitions along axes that are only expanded, which cost nothing to see."""
    for axis, stride in enumerate(index.stride()):
        if stride == 0 and index.shape[axis] > 1:
            index = index.narrow(axis, 0, 1)
    return index


def along(trace: Channels, index: Tensor, axes: Iterable[int]) -> Tensor:
    """Say that ids are the same along each of `axes`; the index with one entry on each of them."""
    chosen = index
    for axis in axes:
        chosen = chosen.narrow(axis, 0, 1)
    trace.join(index, chosen)
    return chosen


def rule_of(node: fx.Node, relu: bool) -> Rule | None:
    """The rule for a node, None for all that is not linear; with `relu`, ReLU passes positive factors."""
    if is_call(node, LAYOUT):
        return _layout
    if relu and is_call(node, aten.relu.default):
        return _relu
    return _RULES.get(node.target)


def _layout(trace: Channels, node: fx.Node) -> Step | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.target is operator.getitem and not isinstance(trace.index(source), tuple | list):
        return None  # an output of an operator that is not linear
    rest = node.args[1:], node.kwargs
    literal: dict[fx.Node, Any] = {}
    for other in _nodes(rest):
        value = constant(trace.graph, other)
        literal[other] = other.meta.get("value") if value is None else value
        if literal[other] is None:
            return None
    args, kwargs = fx.node.map_arg(rest, literal.__getitem__)
    target: Any = node.target
    return Step(target(trace.index(source), *args, **kwargs), ((source, 1),))


def _nodes(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(args, found.append)
    return found


def _relu(trace: Channels, node: fx.Node) -> Step | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Step(trace.index(source), ((source, 1),), keeps_offset=False)


def _addition(trace: Channels, node: fx.Node) -> Step | None:
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or node.kwargs:
        return None  # a plain number is the same for all channels
    data = [n for n in (left, right) if n.op != "get_attr"]
    if not any(bool((unspread(trace.index(n)) != FIXED).any()) for n in data):
        return None
    a, b = trace.index(left), trace.index(right)
    trace.join(a, b)
    whole = a if a.shape == shape(node) else b
    return Step(whole.expand(shape(node)), ((left, 1), (right, -1 if node.target == aten.sub.Tensor else 1)))


def _concatenation(trace: Channels, node: fx.Node) -> Step | None:
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    sources = [p for p in parts if isinstance(p, fx.Node)]
    index = torch.cat([trace.index(p) for p in sources], argument(node, "dim"))
    return Step(index, tuple((p, 1) for p in sources), joins=True)


def _product(trace: Channels, node: fx.Node) -> Step | None:
    """By numbers that stay as they are: constants, gates, attention weights."""
    if node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    found = _changeable(trace, left, right)
    if found is None or (node.target == aten.div.Tensor and found is right):
        return None
    index = trace.index(found)
    if index.ndim < len(shape(node)):
        index = index.view(*[1] * (len(shape(node)) - index.ndim), *index.shape)
    return Step(index.expand(shape(node)), ((found, 1),), keeps_offset=False)


def _matmul(trace: Channels, node: fx.Node) -> Step | None:
    """Along an axis on which all numbers are of one channel; weights that sum to 1 keep its offset."""
    left, right = node.args
    found = _changeable(trace, left, right)
    if found is None or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if min(len(shape(left)), len(shape(right))) < 2:
        return None
    inner, other, summed = (-2, left, -1) if found is right else (-1, right, -2)
    alike = along(trace, trace.index(found), [inner])
    averages = is_call(other, aten.softmax.int) and (argument(other, "dim") - summed) % len(shape(other)) == 0
    return Step(alike.expand(shape(node)), ((found, 1),), keeps_offset=averages)


def _changeable(trace: Channels, left: Any, right: Any) -> fx.Node | None:
    """The one of two factors whose channels may be scaled, if the other one's may not."""
    free = [n for n in (left, right) if isinstance(n, fx.Node) and bool((unspread(trace.index(n)) != FIXED).any())]
    return free[0] if len(free) == 1 and left is not right else None


def _across(axes: Callable[[fx.Node], list[int]], keeps_offset: Callable[[fx.Node], bool]) -> Rule:
    """The rule of operators that work along some axes, on each channel alike."""

    def rule(trace: Channels, node: fx.Node) -> Step | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        worked = [axis % len(shape(source)) for axis in axes(node)]
        index = along(trace, trace.index(source), worked)
        if len(shape(node)) < index.ndim:
            index = index.squeeze(worked)
        return Step(index.expand(shape(node)), ((source, 1),), keeps_offset=keeps_offset(node))

    return rule


def _dims(node: fx.Node) -> list[int]:
    dims = argument(node, "dim")
    if dims is None or dims == []:
        return list(range(len(shape(node.args[0]))))  # type: ignore[arg-type]
    return as_list(dims, 1)


def _spatial(node: fx.Node) -> list[int]:
    return list(range(2, len(shape(node))))


def _padded_axes(node: fx.Node) -> list[int]:
    pads = argument(node, "pad")
    return [-1 - i // 2 for i, pad in enumerate(pads) if pad]


def _averages(node: fx.Node) -> bool:
    """Whether a pool divides by the number of pictures' pixels it has seen."""
    padded = any(as_list(argument(node, "padding"), 2)) and argument(node, "count_include_pad")
    return not padded and argument(node, "divisor_override") is None


def _always(node: fx.Node) -> bool:
    return True


def _never(node: fx.Node) -> bool:
    return False


_zeros = _across(_padded_axes, _never)
_repeats = _across(_padded_axes, _always)


def _padding(trace: Channels, node: fx.Node) -> Step | None:
    if node.target == aten.pad.default and argument(node, "mode") != "constant":
        return _repeats(trace, node)
    return _zeros(trace, node) if not argument(node, "value") else None


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(ADDITIONS, _addition),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), _product),
    aten.cat.default: _concatenation,
    aten.matmul.default: _matmul,
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _padding),
    aten.mean.dim: _across(_dims, _always),
    aten.amax.default: _across(_dims, _always),
    aten.amin.default: _across(_dims, _always),
    aten.sum.dim_IntList: _across(_dims, _never),
    aten.avg_pool2d.default: _across(_spatial, _averages),
    aten.max_pool2d.default: _across(_spatial, _always),
    aten.adaptive_avg_pool2d.default: _across(_spatial, _always),
    **dict.fromkeys(
        (
            aten.upsample_nearest2d.vec,
            aten._upsample_nearest_exact2d.vec,
            aten.upsample_bilinear2d.vec,
            aten.upsample_bicubic2d.vec,
        ),
        _across(_spatial, _always),
    ),
}
