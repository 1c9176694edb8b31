"""A quantized model: the float graph, its sites, and a quantizer for each of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.graph.ops import MATMUL, channel_axis, is_call, set_weight, tidy, weight_of
from qhyvit.graph.ops import copy_graph as copy_graph
from qhyvit.graph.sites import Sites, source_site
from qhyvit.integer import IntegerProduct
from qhyvit.operators.base import IntegerOperator
from qhyvit.quantizers.base import Quantizer
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.recipe import Recipe


@dataclass
class Parameters:
    """What a method chose.

    Attributes:
        activations: quantizer of each activation site, by the site's value; of any format.
        weights: quantizer of each weight site, by its node.
        codes: integer weights (int32, the weight's shape) by node, where a method rounded them itself; all others are
            rounded to nearest.
        biases: changed biases (C_out,) by node (bias correction).
        operators: integer forms of operators (softmax, norms), by node; the simulation computes these instead.
        notes: sentences for the report: what did not apply, and where.
        report: further JSON-able facts by topic, such as "overflow".
        correct_biases: whether the method wants biases corrected, whatever the recipe says.
    """

    activations: dict[str, Quantizer] = field(default_factory=dict)
    weights: dict[str, UniformAffine] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    correct_biases: bool = False
    operators: dict[str, IntegerOperator] = field(default_factory=dict)

    def uniform(self, value: str) -> UniformAffine:
        """The quantizer of an activation site that holds a uniform one."""
        quantizer = self.activations[value]
        assert isinstance(quantizer, UniformAffine), f"{value} has a quantizer of kind {quantizer.kind}"
        return quantizer


@dataclass
class QuantizedModel:
    """A float graph with the parameters that make it an integer model.

    Attributes:
        graph: float graph (N, 3, H, W) → logits (N, classes).
        sites: where quantizers stand.
        parameters: the quantizers.
        recipe: how they were found.
        info: JSON-able facts: model name, source, preprocessing, class names, number of classes.
        integer_bias: whether biases are rounded to int32 at the scale of their accumulator, as runtimes do.
    """

    graph: fx.GraphModule
    sites: Sites
    parameters: Parameters
    recipe: Recipe
    info: dict[str, Any]
    integer_bias: bool = True

    def codes(self, node: str) -> Tensor:
        """Integer weight of a layer, int32, in the weight's shape."""
        if node in self.parameters.codes:
            return self.parameters.codes[node]
        found = weight_of(self.graph, self.nodes[node])
        assert found is not None
        return self.parameters.weights[node].quantize(found[0])

    def bias(self, node: str) -> Tensor | None:
        """Bias of a layer, float, after correction but before rounding."""
        return corrected_bias(self.graph, self.parameters, self.nodes[node])

    def bias_scale(self, node: str) -> Tensor | None:
        """Scale (C_out,) of a layer's int32 bias: input scale × weight scale; None without one input scale."""
        scale = bias_scale(self.sites, self.parameters, self.nodes[node])
        return scale if scale is None or scale.ndim else scale.expand(self.codes(node).shape[0])

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """Graph nodes by name."""
        return {n.name: n for n in self.graph.graph.nodes}

    def input_site(self, node: fx.Node, position: int) -> str | None:
        """Name of the activation site whose codes reach an operand through layout operators, or None."""
        return source_site(self.sites, node, position)

    def simulation(self, *, integer: bool = True) -> fx.GraphModule:
        """The graph with fake quantization at every site.

        Args:
            integer: multiply codes, as the target's integer kernels do, where it has such kernels, and compute the
                integer forms of operators; False computes on dequantized floats everywhere, which is differentiable
                (straight-through).
        """
        graph = copy_graph(self.graph)
        nodes = {n.name: n for n in graph.graph.nodes}
        for layer in self.sites.weights:
            values = self.parameters.weights[layer.node].dequantize(self.codes(layer.node))
            set_weight(graph, nodes[layer.node], values, self._rounded_bias(layer.node))
        products = self._integer_products() if integer and self.integer_bias else {}
        for position, site in enumerate(self.sites.activations):
            if site.value in products and products[site.value].requantizes:
                continue
            # a copy: casting or moving the simulation must not touch the parameters
            graph.add_submodule(f"quantizer_{position}", copy.deepcopy(self.parameters.activations[site.value]))
            source = nodes[site.value]
            with graph.graph.inserting_after(source):
                fake = graph.graph.call_module(f"quantizer_{position}", (source,))
            fake.meta.update(module=site.module, shape=site.shape)
            for reader in site.readers:
                nodes[reader].replace_input_with(source, fake)
        for position, (name, product) in enumerate(products.items()):
            _replace(graph, nodes[name], f"product_{position}", product, product.operands)
        for position, (name, operator) in enumerate(self.parameters.operators.items() if integer else ()):
            _replace(graph, nodes[name], f"operator_{position}", copy.deepcopy(operator), 1)
        tidy(graph)
        return graph

    def _integer_products(self) -> dict[str, IntegerProduct]:
        """By node, the products whose operands are both codes with one scale per tensor."""
        whole = {
            s.value for s in self.sites.activations if set(s.readers) == {u.name for u in self.nodes[s.value].users}
        }
        layers = {s.node for s in self.sites.weights}
        found = {}
        for name, node in self.nodes.items():
            if name not in layers and not is_call(node, MATMUL):
                continue
            left = self._operand_quantizer(node, 0)
            right = None if name in layers else self._operand_quantizer(node, 1)
            if left is None or (right is None and name not in layers):
                continue
            output = _integer_exact(self.parameters.activations[name]) if name in whole else None
            found[name] = self._product(node, left, right, output)
        return found

    def _operand_quantizer(self, node: fx.Node, position: int) -> UniformAffine | None:
        """Quantizer of an operand that consists of integer codes with one scale, else None."""
        return _operand_quantizer(self.sites, self.parameters, node, position)

    def _product(
        self, node: fx.Node, left: UniformAffine, right: UniformAffine | None, output: UniformAffine | None
    ) -> IntegerProduct:
        operator: Any = node.target
        if right is not None:
            return IntegerProduct(operator, (), left, right, None, left.scale * right.scale, 0, output)
        quantizer, scale = self.parameters.weights[node.name], self.bias_scale(node.name)
        assert scale is not None
        codes = self.codes(node.name)
        zero_point = quantizer.zero_point
        if quantizer.axis is not None:
            zero_point = zero_point.view(-1, *[1] * (codes.ndim - 1))
        weight = (codes - zero_point).float()
        bias = self.bias(node.name)
        rest = (None if bias is None else integer_bias(bias, scale), *node.args[3:])
        return IntegerProduct(operator, rest, left, None, weight, scale, channel_axis(node), output)

    def _rounded_bias(self, node: str) -> Tensor | None:
        bias = self.bias(node)
        return rounded_bias(bias, self.bias_scale(node)) if self.integer_bias and bias is not None else bias


def corrected_bias(graph: fx.GraphModule, parameters: Parameters, node: fx.Node) -> Tensor | None:
    """Bias (C_out,) of a layer, float, after correction but before rounding; None without one."""
    if node.name in parameters.biases:
        return parameters.biases[node.name]
    found = weight_of(graph, node)
    return None if found is None else found[1]


def bias_scale(sites: Sites, parameters: Parameters, node: fx.Node) -> Tensor | None:
    """Scale of a layer's int32 bias, (C_out,) or a scalar: input scale × weight scale; None without one input scale."""
    quantizer = _operand_quantizer(sites, parameters, node, 0)
    return None if quantizer is None else quantizer.scale * parameters.weights[node.name].scale


def _operand_quantizer(sites: Sites, parameters: Parameters, node: fx.Node, position: int) -> UniformAffine | None:
    source = source_site(sites, node, position)
    return None if source is None else _integer_exact(parameters.activations[source])


def _integer_exact(quantizer: Quantizer) -> UniformAffine | None:
    """A quantizer with whose codes integer kernels multiply and add: uniform, one scale per tensor."""
    return quantizer if isinstance(quantizer, UniformAffine) and quantizer.axis is None else None


def _replace(graph: fx.GraphModule, old: fx.Node, name: str, module: torch.nn.Module, operands: int) -> None:
    """Let a module compute a node's value from its first operands, under the node's name."""
    graph.add_submodule(name, module)
    with graph.graph.inserting_before(old):
        new = graph.graph.call_module(name, old.args[:operands])
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    called = old.name
    graph.graph.erase_node(old)
    new.name = called


def integer_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Bias codes: round(bias / scale), kept inside int32; float64 while they are counted, returned in bias's dtype."""
    limit = 2.0**31 - 128  # the largest float32 below 2³¹
    return torch.round(bias.double() / scale.double()).clamp(-limit, limit).to(bias.dtype)


def rounded_bias(bias: Tensor, scale: Tensor | None) -> Tensor:
    """A bias (C_out,) as its int32 codes hold it; unchanged where there is no scale for them (None)."""
    return bias if scale is None else integer_bias(bias, scale) * scale
