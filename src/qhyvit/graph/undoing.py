"""A layer made to read x' = (x - m) / t in place of x, exactly: W·t as weights, W·m in its bias.

A convolution that pads with zeros reads 0 where x' should be -m / t. What its bias then holds too much is the same
number in each picture and differs from 0 along the border only, so it is taken away again by a constant map.
(Filter-wise shifting, Trio-ViT, arXiv 2405.03882, is exact for 1×1 kernels; this is it for all.)
"""

from __future__ import annotations

from torch import Tensor, fx

from qhyvit.graph.affine import is_padded, per_input_channel
from qhyvit.graph.ops import add_constant, argument, aten, constant, is_call, set_weight, shape, weight_of


def undo(graph: fx.GraphModule, layer: fx.Node, factor: Tensor, offset: Tensor) -> None:
    """Rewrite a layer whose input channels were shifted and scaled, so that its output stays what it was.

    Args:
        graph: changed in place; not recompiled.
        layer: a convolution or linear with constant weights.
        factor: t > 0 of each input channel, (C_in,).
        offset: m of each input channel, (C_in,); before zero padding one addition remains behind the layer.
    """
    weight, bias = weight_of(graph, layer)  # type: ignore[misc]
    wide, groups = weight.double(), argument(layer, "groups", 1) or 1
    t, m = factor.to(weight.device).double(), offset.to(weight.device).double()
    if bool(m.any()):
        moved = (wide * per_input_channel(m, weight, groups)).flatten(1).sum(1)
        bias = (moved if bias is None else bias + moved).to(weight.dtype)
        if is_padded(layer):
            _add(graph, layer, (_answer(layer, wide, m) - moved.view(-1, *[1] * (weight.ndim - 2))).to(weight.dtype))
    set_weight(graph, layer, (wide * per_input_channel(t, weight, groups)).to(weight.dtype), bias)


def _answer(layer: fx.Node, weight: Tensor, offset: Tensor) -> Tensor:
    """What a convolution without bias answers to offsets everywhere, (C_out, …)."""
    assert isinstance(layer.args[0], fx.Node)
    size = shape(layer.args[0])[1:]
    x = offset.view(-1, *[1] * (len(size) - 1)).expand(size)[None]
    out: Tensor = layer.target(x, weight, None, *layer.args[3:], **layer.kwargs)  # type: ignore[operator]
    return out[0]


def _add(graph: fx.GraphModule, layer: fx.Node, border: Tensor) -> None:
    """Add a constant map to a layer's output, or to the one that is added already."""
    added = next(iter(layer.users))
    known = constant(graph, added.args[1]) if len(layer.users) == 1 and is_call(added, aten.add.Tensor) else None
    if known is not None and known.shape == border.shape:
        added.args = (layer, add_constant(graph, f"{layer.name}_border", known + border, added))
        return
    with graph.graph.inserting_after(layer):
        added = graph.graph.call_function(aten.add.Tensor, (layer, layer))
    layer.replace_all_uses_with(added)
    added.args = (layer, add_constant(graph, f"{layer.name}_border", border, added))
    added.meta = dict(layer.meta)
