"""BatchNorm in eval mode as what it is: a constant factor and offset per channel."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from qhyvit.graph.ops import add_constant, argument, aten, constant, insert, is_call, shape

_NORMS = frozenset({aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default})


def plain_batch_norms(graph: fx.GraphModule) -> int:
    """Write each BatchNorm as x·a + b with constants a, b of shape (C, 1, …); `fold_affines` then folds both."""
    changed = 0
    for node in list(graph.graph.nodes):
        if not is_call(node, _NORMS):
            continue
        mean, var = (constant(graph, argument(node, n)) for n in ("running_mean", "running_var"))
        if mean is None or var is None:
            continue
        factor, offset = _factors(graph, node, mean, var)
        spatial = [1] * (len(shape(argument(node, "input"))) - 2)
        a = add_constant(graph, f"{node.name}_factor", factor.view(-1, *spatial), node)
        b = add_constant(graph, f"{node.name}_offset", offset.view(-1, *spatial), node)
        scaled = insert(graph, node, aten.mul.Tensor, argument(node, "input"), a)
        shifted = insert(graph, node, aten.add.Tensor, scaled, b)
        readers = [u for u in node.users if u.target is operator.getitem] or [node]
        for reader in readers:
            reader.replace_all_uses_with(shifted)
            graph.graph.erase_node(reader)
        changed += 1
    return changed


def _factors(graph: fx.GraphModule, node: fx.Node, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = (constant(graph, argument(node, n)) for n in ("weight", "bias"))
    # In float64: the fold's own rounding should not show beside the float network's.
    factor = 1 / torch.sqrt(var.double() + argument(node, "eps"))
    if weight is not None:
        factor = factor * weight.double()
    offset = -mean.double() * factor
    if bias is not None:
        offset = offset + bias.double()
    return factor.to(mean.dtype), offset.to(mean.dtype)
