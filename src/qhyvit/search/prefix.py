"""The float and the quantized network side by side, node by node, over some pictures.

What is fitted to the errors that came before it (ridge compensation, block reconstruction) sees at each layer the input
that the quantized network gives it, and the output that the float network has there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qhyvit.graph.ops import constant
from qhyvit.graph.sites import Sites
from qhyvit.quantized import Parameters, bias_scale, corrected_bias, rounded_bias


class Net(Protocol):
    """A graph and where its quantizers stand: a `Problem`, a `QuantizedModel`."""

    @property
    def graph(self) -> fx.GraphModule:
        """Float graph."""

    @property
    def sites(self) -> Sites:
        """Where quantizers stand."""

    @property
    def integer_bias(self) -> bool:
        """Whether biases are rounded to int32."""


class Execution:
    """Runs single nodes of a graph, with quantizers in place or without.

    Args:
        net: graph and sites.
        parameters: the quantizers, looked up anew at each node.
    """

    def __init__(self, net: Net, parameters: Parameters) -> None:
        self.net, self.graph, self.parameters = net, net.graph, parameters
        self.layers = {s.node for s in net.sites.weights}
        self.sites = {(reader, s.value) for s in net.sites.activations for reader in s.readers}

    def float_value(self, node: fx.Node, values: Mapping[str, Any]) -> Any:
        """What a node computes in the float network, given the values that it reads."""
        return self._call(node, lambda n: self._read(n, values))

    def quantized_value(self, node: fx.Node, values: Mapping[str, Any]) -> Any:
        """The same in the quantized network: operands through their quantizers, weights and biases as they stand."""
        args, kwargs = self.operands(node, values)
        if node.name in self.layers:
            args[1:3] = self.layer(node, args[1])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def operands(self, node: fx.Node, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments of a node with activations through their quantizers; constants are float."""

        def coded(n: fx.Node) -> Any:
            value = self._read(n, values)
            return self.parameters.activations[n.name](value) if (node.name, n.name) in self.sites else value

        return list(fx.node.map_arg(node.args, coded)), dict(fx.node.map_arg(node.kwargs, coded))

    def layer(self, node: fx.Node, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Dequantized weight of a layer, and its bias as it is stored."""
        quantizer, codes = self.parameters.weights[node.name], self.parameters.codes.get(node.name)
        values = quantizer(weight) if codes is None else quantizer.dequantize(codes)
        return values, self.bias(node)

    def bias(self, node: fx.Node) -> Tensor | None:
        """Bias (C_out,) of a layer, rounded where the target does so."""
        bias = corrected_bias(self.graph, self.parameters, node)
        if bias is None or not self.net.integer_bias:
            return bias
        return rounded_bias(bias, bias_scale(self.net.sites, self.parameters, node))

    def _read(self, n: fx.Node, values: Mapping[str, Any]) -> Any:
        return constant(self.graph, n) if n.op == "get_attr" else values[n.name]

    def _call(self, node: fx.Node, read: Any) -> Any:
        args, kwargs = fx.node.map_arg(node.args, read), fx.node.map_arg(node.kwargs, read)
        return node.target(*args, **kwargs)  # type: ignore[operator]


class Prefix:
    """Values of both networks up to where they have been run, for some batches of pictures; dead ones are freed.

    Args:
        net: graph and sites.
        parameters: the quantizers.
        batches: pictures (n, 3, H, W).

    Attributes:
        nodes: what there is to run, in graph order.
        clean, noisy: values of the float and of the quantized network by node name, one for each batch.
    """

    def __init__(self, net: Net, parameters: Parameters, batches: Iterable[Tensor]) -> None:
        self.execution = Execution(net, parameters)
        images = list(batches)
        every = list(net.graph.graph.nodes)
        self.nodes = [n for n in every if n.op == "call_function"]
        self.clean: dict[str, list[Any]] = {n.name: list(images) for n in every if n.op == "placeholder"}
        self.noisy: dict[str, list[Any]] = {name: list(values) for name, values in self.clean.items()}
        self._readers = Counter(operand.name for n in self.nodes for operand in n.all_input_nodes)
        self._last = {operand.name for n in every if n.op == "output" for operand in n.all_input_nodes}
        self.batches = len(images)

    @torch.no_grad()
    def advance(self, nodes: Iterable[fx.Node]) -> None:
        """Run some nodes, whose operands must have been run, in both networks."""
        for node in nodes:
            both = ((self.clean, self.execution.float_value), (self.noisy, self.execution.quantized_value))
            for values, run in both:
                values[node.name] = [run(node, self.at(values, node, i)) for i in range(self.batches)]
            for operand in node.all_input_nodes:
                self._readers[operand.name] -= 1
                if not self._readers[operand.name] and operand.name not in self._last:
                    self.clean.pop(operand.name, None)
                    self.noisy.pop(operand.name, None)

    @staticmethod
    def at(values: dict[str, list[Any]], node: fx.Node, batch: int) -> dict[str, Any]:
        """What a node reads, in one batch."""
        return {n.name: values[n.name][batch] for n in node.all_input_nodes if n.op != "get_attr"}


def first_batches(stream: Iterable[Tensor], count: int, size: int | None = None) -> list[Tensor]:
    """The first `count` pictures (n, 3, H, W) of a stream, fewer if it has not so many, in its batches or of `size`."""
    found: list[Tensor] = []
    for images in stream:
        found.append(images[: count - sum(map(len, found))])
        if sum(map(len, found)) >= count:
            break
    return found if size is None else list(torch.split(torch.cat(found), size))
