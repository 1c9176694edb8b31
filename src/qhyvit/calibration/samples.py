"""A sample of what each operator computes in the float network, weighted by squared gradients.

The search needs the inputs and outputs of a layer at some positions, not at all of them: memory stays below
positions × (K + 2·C_out) numbers per layer whatever the number of pictures. Positions are drawn with probability
½ uniform + ½ ∝ Σ_o g², weights corrected so that sums stay unbiased; positions that hold the extremes of a group's
input are always taken, because that is where clipping shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from qhyvit.graph.ops import LINEAR, argument, as_list, is_call, weight_of

EXTREMES = 4  # positions taken for their input in every batch
PIECE = 64  # numbers whose largest one stands for them all at first


@dataclass
class LayerSample:
    """One convolution or linear at M positions, as a grouped matrix product.

    Attributes:
        x: inputs (M, groups, K), K = C_in / groups × kernel size, channel-major.
        y: float outputs (M, groups, C_out / groups).
        weight: importance × g² (M, groups, C_out / groups), mean 1.
    """

    x: Tensor
    y: Tensor
    weight: Tensor


@dataclass
class ProductSample:
    """A matmul of activations on S slices (one head of one picture each).

    Attributes:
        a, b: operands (S, n, k), (S, k, m).
        y: float product (S, n, m).
        weight: g² (S, n, m), mean 1.
        head: index of each slice along the axis before the matrices (S,), int64.
    """

    a: Tensor
    b: Tensor
    y: Tensor
    weight: Tensor
    head: Tensor

    @cached_property
    def alike(self) -> bool:
        """Whether all numbers of the product weigh 1."""
        return bool((self.weight == 1).all())


@dataclass
class ValueSample:
    """Single numbers of a value (M,), how many each stands for (M,), and its weight importance × g² (M,), mean 1."""

    x: Tensor
    importance: Tensor
    weight: Tensor


def normalised(weight: Tensor) -> Tensor:
    """Weights with mean 1; all ones where they are all zero (a value that the loss does not see)."""
    mean = weight.mean()
    return weight / mean if bool(mean > 0) else torch.ones_like(weight)


def positions(score: Tensor | None, extremes: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw positions for each group of a layer by itself.

    Args:
        score: Σ_o g² at every position (G, P), or None where all count alike.
        extremes: largest |input| seen at every position (G, P).
        count: how many to draw, beside the extremes.
        generator: seeded.

    Returns:
        Indices and importance weights (G, M).
    """
    groups, size = extremes.shape
    top = torch.topk(extremes, min(EXTREMES, size)).indices.cpu()
    if score is None:
        drawn = torch.randint(size, (groups, count), generator=generator)
        importance = torch.full((groups, count), size / count)
    else:
        total = score.sum(1, keepdim=True)
        share = torch.where(total > 0, score / total, 1 / size)
        probability = (0.5 * share + 0.5 / size).cpu()
        drawn = torch.multinomial(probability, count, replacement=True, generator=generator)
        importance = 1 / (count * probability.gather(1, drawn))
    taken = torch.zeros(groups, size, dtype=torch.bool).scatter_(1, top, True).gather(1, drawn)
    importance = importance.masked_fill(taken, 0.0)  # extremes count once, for themselves
    return torch.cat([drawn, top], 1), torch.cat([importance, torch.ones(top.shape)], 1)


def sample_layer(
    graph: fx.GraphModule, node: fx.Node, x: Tensor, y: Tensor, g: Tensor | None, count: int, gen: torch.Generator
) -> LayerSample:
    """Sample one batch of a convolution's or linear's input `x`, output `y` and output gradient `g` (None: ones).

    Each group of a convolution has positions of its own: its extremes lie elsewhere than the next one's.
    """
    found = weight_of(graph, node)
    assert found is not None
    weight, groups = found[0], argument(node, "groups", 1) or 1
    linear = is_call(node, LINEAR)

    outputs = _by_position(y, groups, linear)
    square = None if g is None else _by_position(g, groups, linear).square()
    score = None if square is None else square.sum(3).permute(2, 0, 1).flatten(1)
    if linear:
        flat = x.reshape(1, -1, x.shape[-1])
        index, importance = positions(score, flat.abs().amax(2), count, gen)
        inputs = flat[:, index[0]]
    else:
        reach = x.abs().view(len(x), groups, -1, *x.shape[2:]).amax(2)
        if x.shape[2:] != y.shape[2:]:
            reach = F.adaptive_max_pool2d(reach, y.shape[2:])
        index, importance = positions(score, reach.transpose(0, 1).flatten(1), count, gen)
        inputs = _patches(node, x, weight.shape[2:], index, y.shape)
    size = outputs.shape[1]
    drawn = index.div(size, rounding_mode="floor"), index % size, torch.arange(groups)[:, None]
    taken = outputs[drawn]  # (G, M, O)
    importance = importance[:, :, None].to(taken)
    weighed = importance.expand_as(taken) if square is None else square[drawn] * importance
    return LayerSample(inputs.transpose(0, 1), taken.transpose(0, 1), weighed.transpose(0, 1))


def _by_position(value: Tensor, groups: int, linear: bool) -> Tensor:
    """A layer's output as N pictures × P positions × groups × channels of a group, without copying it."""
    if linear:
        return value.reshape(1, -1, groups, value.shape[-1] // groups)
    return value.reshape(len(value), groups, value.shape[1] // groups, -1).permute(0, 3, 1, 2)


def _patches(node: fx.Node, x: Tensor, kernel: torch.Size, index: Tensor, out: torch.Size) -> Tensor:
    """Input patches (G, M, K) behind flat output positions (G, M) of a 2-D convolution."""
    stride, padding, dilation = (
        as_list(argument(node, n, d), 2) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    height, width = out[2], out[3]
    batch, row, column = index // (height * width), index // width % height, index % width
    rows = (row * stride[0])[..., None] + torch.arange(kernel[0]) * dilation[0]
    columns = (column * stride[1])[..., None] + torch.arange(kernel[1]) * dilation[1]
    channels = torch.arange(x.shape[1]).view(len(index), -1)
    return padded[
        batch[:, :, None, None, None],
        channels[:, None, :, None, None],
        rows[:, :, None, :, None],
        columns[:, :, None, None, :],
    ].flatten(2)


def sample_product(
    a: Tensor, b: Tensor, y: Tensor, g: Tensor | None, count: int, rows: int, gen: torch.Generator
) -> ProductSample:
    """Sample `count` slices of a batched matmul, and at most `rows` rows of each."""
    leading = y.shape[:-2]
    a, b = a.expand(*leading, *a.shape[-2:]).flatten(0, -3), b.expand(*leading, *b.shape[-2:]).flatten(0, -3)
    y, g = y.flatten(0, -3), torch.ones_like(y).flatten(0, -3) if g is None else g.flatten(0, -3)
    pick = torch.randperm(len(y), generator=gen)[:count]
    row = torch.randperm(y.shape[1], generator=gen)[:rows]
    head = pick % (leading[-1] if len(leading) > 1 else 1)
    return ProductSample(a[pick][:, row], b[pick], y[pick][:, row], g[pick][:, row].square(), head)


def sample_value(x: Tensor, g: Tensor | None, count: int, gen: torch.Generator) -> ValueSample:
    """Sample single numbers of a value: an eighth of them its largest, each for itself, the others at random.

    The error of a clipped range is that of few large numbers, of which a plain sample has hardly any.
    """
    x = x.flatten()
    g = torch.ones_like(x) if g is None else g.flatten()
    if len(x) <= count:
        return ValueSample(x, torch.ones_like(x), g.square())
    top, outermost = largest(x.abs(), max(1, count // 8))
    drawn = torch.randint(len(x), (count - len(top),), generator=gen).to(x.device)
    drawn = drawn[x[drawn].abs() < top[-1]]
    importance = torch.full((len(drawn),), (len(x) - len(top)) / max(1, len(drawn))).to(x)
    importance = torch.cat([torch.ones_like(top), importance])
    index = torch.cat([outermost, drawn])
    return ValueSample(x[index], importance, g[index].square() * importance)


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`torch.topk(x, count)` of many numbers (n,), in a fraction of the time.

    They lie in pieces whose own largest numbers are the `count` largest of all pieces', or equal to them.
    """
    whole = len(x) // PIECE * PIECE
    if whole // PIECE <= count:
        found = torch.topk(x, count)
        return found.values, found.indices
    pieces = torch.topk(x[:whole].view(-1, PIECE).amax(1), count).indices
    index = (pieces[:, None] * PIECE + torch.arange(PIECE, device=x.device)).flatten()
    index = torch.cat([index, torch.arange(whole, len(x), device=x.device)])
    found = torch.topk(x[index], count)
    return found.values, index[found.indices]
