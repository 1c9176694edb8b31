"""Fused attention opened into matmul, scale, mask, softmax, matmul, so that its operands become sites."""

from __future__ import annotations

import math

import torch
from torch import fx

from qhyvit.errors import CaptureError
from qhyvit.graph.ops import add_constant, argument, aten, constant, insert, is_call, shape


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
        scaled = insert(graph, node, aten.mul.Tensor, query, scale)
        keys = insert(graph, node, aten.transpose.int, key, -2, -1)
        scores = insert(graph, node, aten.matmul.default, scaled, keys)
        masked = scores if mask is None else _mask(graph, node, scores, mask)
        weights = insert(graph, node, aten.softmax.int, masked, -1)
        out = insert(graph, node, aten.matmul.default, weights, value)
        node.replace_all_uses_with(out)
        graph.graph.erase_node(node)  # it may draw random numbers, so dead code elimination would keep it
        opened += 1
    return opened


def _mask(graph: fx.GraphModule, node: fx.Node, scores: fx.Node, mask: fx.Node) -> fx.Node:
    """Scores under a mask: an additive one, or a boolean one whose False shuts a position out."""
    if mask.meta["dtype"] != torch.bool:
        return insert(graph, node, aten.add.Tensor, scores, mask)
    value = constant(graph, mask)
    minus = torch.tensor(-math.inf, dtype=scores.meta["dtype"])
    if value is None:
        return insert(graph, node, aten.where.self, mask, scores, add_constant(graph, "minus_infinity", minus, node))
    additive = torch.zeros_like(value, dtype=minus.dtype).masked_fill(~value, -math.inf)
    return insert(graph, node, aten.add.Tensor, scores, add_constant(graph, f"{node.name}_mask", additive, node))
