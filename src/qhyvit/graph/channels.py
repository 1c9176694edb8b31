"""Following channels through operators that only move numbers.

A tensor that holds, at every position, the *index* of the channel the number there came from is sent through the same
layout operators as the data. What arrives says which channels are where, for any mix of reshapes, permutations, splits
and slices, without a rule per operator.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.graph.ops import (
    AVERAGING,
    LAYOUT,
    MATMUL,
    WEIGHTED,
    argument,
    aten,
    channel_axis,
    is_call,
    shape,
    weight_of,
)


def channel_indices(size: tuple[int, ...], axis: int) -> Tensor:
    """Float64 tensor of shape `size` whose value is the index along `axis`."""
    view = [1] * len(size)
    view[axis] = -1
    return torch.arange(size[axis], dtype=torch.float64).view(view).expand(size).contiguous()


def _apply(node: fx.Node, value: Any) -> Any | None:
    """Run one layout operator on an index tensor; None where its arguments are not literal."""
    if any(isinstance(a, fx.Node) for a in _flat(node.args[1:])):
        return None
    return node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]


def _flat(args: Any) -> list[Any]:
    return [b for a in args for b in _flat(a)] if isinstance(args, tuple | list) else [args]


def origin(graph: fx.GraphModule, value: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """The convolution or linear whose output channels make up `value`, if changing them changes nothing else.

    Returns:
        The producer and, in the shape of `value` for one picture, the output channel each number came from; or None
        where `value` comes from elsewhere or its channels are read by something besides the one user of `value`.
    """
    path: list[fx.Node] = []
    node = value
    while is_call(node, LAYOUT):
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    if not is_call(node, WEIGHTED) or weight_of(graph, node) is None or len(value.users) != 1:
        return None
    index: Any = channel_indices(shape(node), channel_axis(node))
    stages: list[tuple[fx.Node, fx.Node, Any]] = []  # parent, child on the path, indices at the parent
    parent = node
    for child in reversed(path):
        stages.append((parent, child, index))
        index = _apply(child, index)
        if index is None:
            return None
        parent = child
    wanted = _values(index)
    for parent, child, at in stages:
        for other in parent.users:
            if other is child:
                continue
            seen = _apply(other, at) if is_call(other, LAYOUT) and other.args[0] is parent else None
            if seen is None or any(wanted & _values(t) for t in _tensors(seen)):
                return None
    return node, index


def _values(index: Tensor) -> set[int]:
    return set(torch.bincount(index.flatten().long()).nonzero().flatten().tolist())


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def consumers(
    graph: fx.GraphModule,
    value: fx.Node,
    axis: int,
    readers: Collection[str] | None = None,
    *,
    offsets: bool = False,
) -> list[tuple[fx.Node, Tensor]] | None:
    """All convolutions and linears that read the channels of `value` through layout operators and means.

    Args:
        graph: float graph.
        value: any node.
        axis: its channel axis.
        readers: names of the direct readers to follow; None: all.
        offsets: follow offsets by channel only, which pass through attention as well: from values to what it mixes of
            them, since its weights add up to 1; from keys to nothing, since a softmax takes no notice.

    Returns:
        Each with the channel of `value` (axis `axis`) behind each of its input channels, shape (C_in,); None where
        anything else reads them, or where one input channel mixes several. Empty where all offsets come to nothing.
    """
    found: list[tuple[fx.Node, Tensor]] = []
    pending: list[tuple[fx.Node, Any]] = [(value, channel_indices(shape(value), axis))]
    while pending:
        node, index = pending.pop()
        for user in node.users:
            if node is value and readers is not None and user.name not in readers:
                continue
            if is_call(user, LAYOUT | AVERAGING) and user.args[0] is node:
                out = _apply(user, index)
                if out is None or (is_call(user, AVERAGING) and _mixes(user, index, out)):
                    return None
                pending.append((user, out))
            elif is_call(user, WEIGHTED) and user.args[0] is node and isinstance(index, Tensor):
                if weight_of(graph, user) is None:
                    return None
                flat = index.movedim(index.ndim - 1 if user.target == aten.linear.default else 1, 0).flatten(1)
                if (flat - flat[:, :1]).abs().max() > 1e-6:
                    return None
                found.append((user, flat[:, 0].round().long()))
            elif offsets and is_call(user, MATMUL) and user.args[1] is node and _equal_along(index, -2):
                if not _adds_up(user.args[0]):
                    return None
                pending.append((user, index[..., :1, :].expand(shape(user))))
            elif not (offsets and is_call(user, MATMUL) and user.args[1] is node and _vanishes(user, index)):
                return None
    return found if found or offsets else None


def _equal_along(index: Any, axis: int) -> bool:
    return isinstance(index, Tensor) and index.ndim > 2 and bool((index == index.narrow(axis, 0, 1)).all())


def _adds_up(node: object) -> bool:
    """Whether a node is a softmax over its last axis."""
    if not isinstance(node, fx.Node) or not is_call(node, aten.softmax.int):
        return False
    return bool(argument(node, "dim") % len(shape(node)) == len(shape(node)) - 1)


def _vanishes(scores: fx.Node, index: Any) -> bool:
    """Whether offsets of transposed keys add the same to all scores of a query, of which softmax alone is made."""
    return _equal_along(index, -1) and all(_adds_up(user) for user in scores.users)


def _mixes(node: fx.Node, index: Tensor, mean: Tensor) -> bool:
    """Whether a mean takes different channels together: their indices then have a variance."""
    squares = _apply(node, index.square())
    return squares is None or bool(((squares - mean.square()).abs() > 1e-3).any())


def per_channel(constant: Tensor, index: Tensor, channels: int, default: float) -> Tensor | None:
    """The value `constant` (broadcast to the shape of `index`) takes on each channel; None where it differs within one.

    Returns:
        Tensor (channels,) in the dtype of `constant`; `default` for channels that do not occur.
    """
    if constant.ndim > index.ndim:
        return None
    spread, flat = constant.expand(index.shape).flatten(), index.flatten().long()
    result = torch.full((channels,), default, dtype=constant.dtype, device=constant.device)
    result[flat] = spread
    return result if torch.equal(result[flat], spread) else None
