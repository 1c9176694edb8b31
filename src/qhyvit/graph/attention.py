"""Fused attention opened into matmul, scale, mask, softmax, matmul, so that its operands become sites."""

from __future__ import annotations

import math

from torch import fx

from qhyvit.errors import CaptureError
from qhyvit.graph.ops import argument, aten, copy_meta, is_call, shape


def open_attention(graph: fx.GraphModule) -> int:
    """Replace scaled_dot_product_attention by softmax(s·q·kᵀ + mask)·v, the scale s applied to q.

    Raises:
        CaptureError: for causal or grouped-query attention, which image classifiers do not use.
    """
    opened = 0
    for node in list(graph.graph.nodes):
        if not is_call(node, aten.scaled_dot_product_attention.default):
            continue
        if argument(node, "is_causal") or argument(node, "enable_gqa"):
            raise CaptureError(f"{node.meta.get('module')}: causal or grouped-query attention is not supported.")
        query, key, value = node.args[:3]
        mask, scale = argument(node, "attn_mask"), argument(node, "scale")
        if scale is None:
            scale = 1 / math.sqrt(shape(query)[-1])
        build = graph.graph.call_function
        with graph.graph.inserting_before(node):
            scaled = build(aten.mul.Tensor, (query, scale))
            keys = build(aten.transpose.int, (key, -2, -1))
            scores = build(aten.matmul.default, (scaled, keys))
            masked = scores if mask is None else build(aten.add.Tensor, (scores, mask))
            weights = build(aten.softmax.int, (masked, -1))
            out = build(aten.matmul.default, (weights, value))
        copy_meta(node, scaled, keys, scores, masked, weights, out)
        node.replace_all_uses_with(out)
        graph.graph.erase_node(node)  # it may draw random numbers, so dead code elimination would keep it
        opened += 1
    return opened
