"""ONNX forms of pooling, resizing and padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx
from torch.nn import functional as F

from qhyvit.errors import TargetError
from qhyvit.graph.ops import argument, as_list, aten, shape
from qhyvit.targets.onnx_ops import LOWERINGS, Lower, lowers

if TYPE_CHECKING:
    from qhyvit.targets.onnx_lowering import Lowering


@lowers(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default)
def _adaptive_pool(g: Lowering, node: fx.Node) -> Any:
    """One mean over all, equal windows, or, where windows differ in size, a product with averaging weights per axis."""
    size, wanted = shape(node.args[0])[2:], shape(node)[2:]  # type: ignore[arg-type]
    if all(w == 1 for w in wanted):
        return g.op("GlobalAveragePool", g.x(node, 0))
    if not any(s % w for s, w in zip(size, wanted, strict=True)):
        kernel = [s // w for s, w in zip(size, wanted, strict=True)]
        return g.op("AveragePool", g.x(node, 0), kernel_shape=kernel, strides=kernel)
    out = g.op("MatMul", g.x(node, 0), g.b.constant(_averages(size[-1], wanted[-1]).T, "averages"))
    return out if len(size) == 1 else g.op("MatMul", g.b.constant(_averages(size[0], wanted[0]), "averages"), out)


def _averages(size: int, wanted: int) -> NDArray[np.float32]:
    """Weights (wanted, size) of torch's adaptive windows: from floor(i·size/wanted) to ceil((i+1)·size/wanted)."""
    weights = np.zeros((wanted, size), np.float32)
    for i in range(wanted):
        start, end = i * size // wanted, -(-(i + 1) * size // wanted)
        weights[i, start:end] = 1 / (end - start)
    return weights


def _pool_attributes(node: fx.Node) -> dict[str, Any]:
    """Attributes of a pool; sizes that torch rounds up become padding at the end, as ONNX rounds by another rule."""
    n = len(shape(node)) - 2
    kernel = as_list(argument(node, "kernel_size"), n)
    strides = as_list(argument(node, "stride") or kernel, n)
    before = as_list(argument(node, "padding", 0), n)
    after = list(before)
    if argument(node, "ceil_mode"):
        sizes = zip(shape(node)[2:], shape(node.args[0])[2:], strict=True)  # type: ignore[arg-type]
        reach = [d * (k - 1) + 1 for d, k in zip(_dilations(node, n), kernel, strict=True)]
        for i, (new, old) in enumerate(sizes):
            after[i] = max(0, (new - 1) * strides[i] + reach[i] - old - before[i])
    return {"kernel_shape": kernel, "strides": strides, "pads": before + after}


def _dilations(node: fx.Node, n: int) -> list[int]:
    return as_list(argument(node, "dilation", 1), n)


@lowers(aten.avg_pool1d.default, aten.avg_pool2d.default)
def _avg_pool(g: Lowering, node: fx.Node) -> Any:
    if argument(node, "divisor_override") is not None:
        raise TargetError(f"{node.meta.get('module')}: average pooling with a divisor of its own has no ONNX form.")
    attributes, x, n = _pool_attributes(node), g.x(node, 0), len(shape(node)) - 2
    pads = as_list(argument(node, "padding", 0), n)
    if argument(node, "count_include_pad") and any(pads):  # zeros that count; what rounding up adds does not
        x = g.op("Pad", x, g.b.ints(0, 0, *pads, 0, 0, *pads))
        attributes["pads"] = [0] * n + [max(0, a - p) for a, p in zip(attributes["pads"][n:], pads, strict=True)]
    return g.op("AveragePool", x, **attributes)


@lowers(aten.max_pool2d.default)
def _max_pool(g: Lowering, node: fx.Node) -> Any:
    return g.op("MaxPool", g.x(node, 0), dilations=_dilations(node, 2), **_pool_attributes(node))


def _resize(mode: str, coordinates: str = "half_pixel", **attributes: Any) -> Lower:
    def lower(g: Lowering, node: fx.Node) -> Any:
        corners = mode != "nearest" and bool(argument(node, "align_corners"))
        where = "align_corners" if corners else coordinates
        factors = None if corners else _factors(node)
        if factors is None:
            sizes = g.op("Concat", g.batch_size(node.args[0]), g.b.ints(*shape(node)[1:]), axis=0)
            target = ["", sizes]
        else:
            target = [g.b.constant(np.array([1, 1, *factors], np.float32), "scales")]
        return g.op("Resize", g.x(node, 0), "", *target, mode=mode, coordinate_transformation_mode=where, **attributes)

    return lower


def _factors(node: fx.Node) -> list[float] | None:
    """Scale factors the model gave, where they say more than the sizes do."""
    factors = argument(node, "scale_factors") or [argument(node, n) for n in ("scales_h", "scales_w")]
    if any(f is None for f in factors):
        return None
    sizes = zip(shape(node.args[0])[2:], shape(node)[2:], factors, strict=True)  # type: ignore[arg-type]
    return None if all(new == old * f for old, new, f in sizes) else [float(f) for f in factors]


_NEAREST = _resize("nearest", "asymmetric", nearest_mode="floor")
_EXACT = _resize("nearest", nearest_mode="round_prefer_ceil")
_LINEAR = _resize("linear")
_CUBIC = _resize("cubic", cubic_coeff_a=-0.75)
LOWERINGS.update(
    {
        aten.upsample_nearest2d.vec: _NEAREST,
        aten.upsample_nearest2d.default: _NEAREST,
        aten._upsample_nearest_exact2d.vec: _EXACT,
        aten._upsample_nearest_exact2d.default: _EXACT,
        aten.upsample_bilinear2d.vec: _LINEAR,
        aten.upsample_bilinear2d.default: _LINEAR,
        aten.upsample_bicubic2d.vec: _CUBIC,
        aten.upsample_bicubic2d.default: _CUBIC,
    }
)


@lowers(aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default)
def _antialiased(g: Lowering, node: fx.Node) -> Any:
    """A product per axis with torch's own weights: ONNX Runtime's antialiasing weighs the borders otherwise."""
    size, wanted = shape(node.args[0])[2:], shape(node)[2:]  # type: ignore[arg-type]
    mode = "bicubic" if node.target == aten._upsample_bicubic2d_aa.default else "bilinear"
    corners = bool(argument(node, "align_corners"))
    weights = []
    for old, new in zip(size, wanted, strict=True):
        unit = torch.eye(old)[None, None]
        weights.append(F.interpolate(unit, (new, old), mode=mode, align_corners=corners, antialias=True)[0, 0])
    rows = g.op("MatMul", g.b.constant(weights[0], "weights"), g.x(node, 0))
    return g.op("MatMul", rows, g.b.constant(weights[1].t(), "weights"))


@lowers(aten.constant_pad_nd.default, aten.pad.default)
def _pad(g: Lowering, node: fx.Node) -> Any:
    pads = list(argument(node, "pad"))
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    mode = modes[argument(node, "mode") if node.target == aten.pad.default else "constant"]
    rank = len(shape(node))
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    fill = g.b.number(argument(node, "value") or 0.0)
    return g.op("Pad", g.x(node, 0), g.b.ints(*before, *after), fill, mode=mode)
