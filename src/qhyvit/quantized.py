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
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.recipe import Recipe


@dataclass
class Parameters:
    """What a method chose.

    Attributes:
        activations: quantizer of each activation site, by the site's value.
        weights: quantizer of each weight site, by its node.
        codes: integer weights (int32, the weight's shape) by node, where a method rounded them itself; all others are
            rounded to nearest.
        biases: changed biases (C_out,) by node (bias correction).
        notes: sentences for the report: what did not apply, and where.
        report: further JSON-able facts by topic, such as "overflow".
        correct_biases: whether the method wants biases corrected, whatever the recipe says.
    """

    activations: dict[str, UniformAffine] = field(default_factory=dict)
    weights: dict[str, UniformAffine] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    correct_biases: bool = False


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
        if node in self.parameters.biases:
            return self.parameters.biases[node]
        found = weight_of(self.graph, self.nodes[node])
        return None if found is None else found[1]

    def bias_scale(self, node: str) -> Tensor | None:
        """Scale (C_out,) of a layer's int32 bias: input scale × weight scale; None without one input scale."""
        source = self.input_site(self.nodes[node], 0)
        if source is None or self.parameters.activations[source].axis is not None:
            return None
        weight = self.parameters.weights[node].scale
        scale = self.parameters.activations[source].scale * weight
        return scale.expand(self.codes(node).shape[0]) if scale.ndim == 0 else scale

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
            integer: multiply codes, as the target's integer kernels do, where it has such kernels; False multiplies
                dequantized floats everywhere, which is differentiable (straight-through).
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
            graph.add_submodule(f"product_{position}", product)
            old = nodes[name]
            with graph.graph.inserting_before(old):
                new = graph.graph.call_module(f"product_{position}", old.args[: product.operands])
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
            graph.graph.erase_node(old)
            new.name = name
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
            output = self.parameters.activations[name] if name in whole else None
            if output is not None and output.axis is not None:
                output = None
            found[name] = self._product(node, left, right, output)
        return found

    def _operand_quantizer(self, node: fx.Node, position: int) -> UniformAffine | None:
        source = self.input_site(node, position)
        quantizer = None if source is None else self.parameters.activations[source]
        return quantizer if quantizer is not None and quantizer.axis is None else None

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
        bias, scale = self.bias(node), self.bias_scale(node) if self.integer_bias else None
        if bias is None or scale is None:
            return bias
        return integer_bias(bias, scale) * scale


def integer_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Bias codes: round(bias / scale), kept inside int32; float64 while they are counted, returned in bias's dtype."""
    limit = 2.0**31 - 128  # the largest float32 below 2³¹
    return torch.round(bias.double() / scale.double()).clamp(-limit, limit).to(bias.dtype)
