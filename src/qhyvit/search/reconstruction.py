"""Block reconstruction: rounding and activation steps of a unit learned by the error of its output.

AdaRound (Nagel et al., arXiv 2004.10568), BRECQ (Li et al., arXiv 2102.05426), QDrop (Wei et al., arXiv 2203.05740).
Inputs of a unit are those of the quantized network, targets those of the float network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.graph.blocks import Unit
from qhyvit.graph.ops import WEIGHTED, constant, is_call
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.prefix import Execution

GAMMA, ZETA = -0.1, 1.1


@dataclass(frozen=True)
class Settings:
    """How a unit is learned.

    Attributes:
        iterations: of Adam, per unit.
        batch: pictures that are run together.
        rate: learning rate of the rounding.
        step_rate: of the activation steps, falling to 0 by a cosine; 0 leaves them.
        weight: λ of the rounding's regularization.
        warmup: share of the iterations without it.
        drop: probability that a number of an activation (or of the unit's inputs) stays float.
    """

    iterations: int
    batch: int
    rate: float
    step_rate: float
    weight: float
    warmup: float
    drop: float


class SoftRounding:
    """Codes floor(w / s) + h(v) of one weight, h a clipped sigmoid between 0 and 1.

    Args:
        weight: float (C_out, …).
        quantizer: its scales and zero points, which stay.
    """

    def __init__(self, weight: Tensor, quantizer: UniformAffine) -> None:
        form = [-1] + [1] * (weight.ndim - 1) if quantizer.axis is not None else []
        self.scale = quantizer.scale.view(form) if form else quantizer.scale
        self.zero = quantizer.zero_point.view(form) if form else quantizer.zero_point
        self.low, self.high = quantizer.quant_min, quantizer.quant_max
        scaled = weight / self.scale
        self.floor = torch.floor(scaled)
        part = (scaled - self.floor).clamp(1e-4, 1 - 1e-4)
        self.v = (-torch.log((ZETA - GAMMA) / (part - GAMMA) - 1)).requires_grad_()

    def h(self) -> Tensor:
        """How far each weight is rounded up, 0 to 1."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def values(self) -> Tensor:
        """The weight while it is learned; gradients reach v."""
        return self._through(self.h())

    def hard_values(self) -> Tensor:
        """The weight with each code rounded up where h is at least ½."""
        return self._through((self.h() >= 0.5).to(self.floor.dtype))

    def codes(self) -> Tensor:
        """The integers of `hard_values`, int32."""
        up = (self.h() >= 0.5).to(self.floor.dtype)
        return (self.floor + up + self.zero).clamp(self.low, self.high).to(torch.int32).detach()

    def regularization(self, beta: float) -> Tensor:
        """Σ 1 - |2h - 1|^β."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()

    def _through(self, up: Tensor) -> Tensor:
        return ((self.floor + up + self.zero).clamp(self.low, self.high) - self.zero) * self.scale


class LearnedStep(torch.autograd.Function):
    """Fake quantization with a gradient for the step (LSQ, Esser et al., arXiv 1902.08153)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        """s·(clip(round(x / s) + z) - z)."""
        codes = torch.round(x / scale) + zero
        clipped = codes.clamp(low, high)
        ctx.save_for_backward(x, scale, codes, clipped, zero)
        ctx.factor = 1 / math.sqrt(max(x.numel(), 1) * max(high, 1))
        return (clipped - zero) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """To x straight through inside the range; to s: round(v) - v inside, the end code outside, v = x / s."""
        x, scale, codes, clipped, zero = ctx.saved_tensors
        inside = codes == clipped
        slope = torch.where(inside, codes - zero - x / scale, clipped - zero)
        return grad * inside, (grad * slope).sum().view(scale.shape) * ctx.factor, None, None, None


@dataclass(frozen=True)
class Batch:
    """What a unit reads and ought to give for pictures that were run together.

    Batches stay as they are: the first axis of a value inside a net may be one of windows or tokens, not of pictures.

    Attributes:
        noisy: the values that it reads in the quantized network, by name.
        clean: the same in the float network.
        targets: its outputs in the float network.
    """

    noisy: dict[str, Any]
    clean: dict[str, Any]
    targets: list[Tensor]


def drawn(batches: list[Batch], count: int, generator: torch.Generator) -> Iterator[Batch]:
    """`count` batches, each of them once before any comes again, every time in another order."""
    order: list[int] = []
    for _ in range(count):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        yield batches[order.pop()]


def relative_error(found: list[Tensor], target: list[Tensor]) -> Tensor:
    """Squared error () as a share of the target's square, summed over a unit's outputs."""
    return torch.stack(
        [(a - b).square().mean() / b.square().mean().clamp_min(1e-12) for a, b in zip(found, target, strict=True)]
    ).sum()


class UnitLearner:
    """Learns the rounding of one unit's weights and the steps of its activations.

    Args:
        execution: the net and its parameters, which are changed at the end of `run`.
        nodes: the unit's, in graph order.
        unit: the unit.
        settings: how.
        generator: what batches and drops are drawn from.
    """

    def __init__(
        self, execution: Execution, nodes: list[fx.Node], unit: Unit, settings: Settings, generator: torch.Generator
    ) -> None:
        self.execution, self.nodes, self.unit, self.settings = execution, nodes, unit, settings
        self.generator = generator
        self.rounding: dict[str, SoftRounding] = {}
        for node in nodes:
            if node.name in execution.layers and is_call(node, WEIGHTED):
                weight = constant(execution.graph, node.args[1])
                assert weight is not None
                self.rounding[node.name] = SoftRounding(weight, execution.parameters.weights[node.name])
        self.steps: dict[str, Tensor] = {}
        for reader, value in sorted(execution.sites) if settings.step_rate > 0 else ():
            quantizer = execution.parameters.activations[value]
            own = value not in unit.inputs and reader in unit.nodes
            if own and isinstance(quantizer, UniformAffine) and quantizer.axis is None:
                self.steps[value] = quantizer.scale.clone().requires_grad_()

    def output(self, values: dict[str, Any], weight: Callable[[SoftRounding], Tensor], drop: float) -> list[Tensor]:
        """The unit's outputs.

        Args:
            values: its inputs by name; gains what is computed.
            weight: how the rounding stands.
            drop: probability of a float number in place of a quantized one.
        """
        for node in self.nodes:

            def coded(n: fx.Node, reader: fx.Node = node) -> Any:
                if n.op == "get_attr":
                    return constant(self.execution.graph, n)
                value = values[n.name]
                return self._coded(n.name, value, drop) if (reader.name, n.name) in self.execution.sites else value

            args, kwargs = list(fx.node.map_arg(node.args, coded)), fx.node.map_arg(node.kwargs, coded)
            if node.name in self.rounding:
                args[1] = weight(self.rounding[node.name])
                bias = self.execution.parameters.biases.get(node.name)
                args[2:3] = [bias] if bias is not None else args[2:3]
            values[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [values[name] for name in self.unit.outputs if isinstance(values[name], Tensor)]

    def _coded(self, name: str, value: Tensor, drop: float) -> Tensor:
        quantizer = self.execution.parameters.activations[name]
        if name in self.steps:
            assert isinstance(quantizer, UniformAffine)
            scale = self.steps[name].clamp_min(torch.finfo(torch.float32).tiny)
            out: Tensor = LearnedStep.apply(  # type: ignore[no-untyped-call]
                value, scale, quantizer.zero_point, quantizer.quant_min, quantizer.quant_max
            )
        else:
            out = quantizer(value)
        return self.mixed(value, out, drop)

    def mixed(self, clean: Tensor, coded: Tensor, drop: float) -> Tensor:
        """Float numbers with probability `drop`, else quantized ones (QDrop)."""
        if drop <= 0:
            return coded
        keep = torch.rand(coded.shape, generator=self.generator).to(coded) < drop
        return torch.where(keep, clean, coded)

    def run(self, batches: list[Batch]) -> tuple[float, float]:
        """Learn, and write codes and steps where the error of the calibration pictures has not risen.

        Args:
            batches: what is learned from.

        Returns:
            The error with nearest rounding and at the end, as shares of the outputs' square.
        """
        names, scales = list(self.rounding), {k: v.detach().clone() for k, v in self.steps.items()}
        before = self._measure(batches)
        variables = [{"params": [r.v for r in self.rounding.values()], "lr": self.settings.rate}]
        if self.steps:
            variables.append({"params": list(self.steps.values()), "lr": self.settings.step_rate})
        optimizer = torch.optim.Adam(variables)
        total = self.settings.iterations
        for i, batch in enumerate(drawn(batches, total, self.generator)):
            if self.steps:
                optimizer.param_groups[1]["lr"] = self.settings.step_rate * (1 + math.cos(math.pi * i / total)) / 2
            values: dict[str, Any] = {
                n: self.mixed(batch.clean[n], v, self.settings.drop) if isinstance(v, Tensor) else v
                for n, v in batch.noisy.items()
            }
            found = self.output(values, SoftRounding.values, self.settings.drop)
            loss = relative_error(found, batch.targets)
            progress = (i / total - self.settings.warmup) / max(1e-9, 1 - self.settings.warmup)
            if progress >= 0:
                beta = 20 - 18 * progress
                share = sum(r.v.numel() for r in self.rounding.values())
                loss = loss + self.settings.weight * sum(r.regularization(beta) for r in self.rounding.values()) / share
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        after = self._measure(batches)
        if after > before:
            for name, scale in scales.items():
                self.steps[name].data.copy_(scale)
            return before, before
        parameters = self.execution.parameters
        for name in names:
            parameters.codes[name] = self.rounding[name].codes()
        for name, step in self.steps.items():
            quantizer = parameters.uniform(name)
            quantizer.scale.copy_(step.detach().clamp_min(torch.finfo(torch.float32).tiny))
        return before, after

    @torch.no_grad()
    def _measure(self, batches: list[Batch]) -> float:
        """Error on all pictures, rounded for good; at the beginning that is to nearest, which h(v0) ≥ ½ is."""
        errors = [relative_error(self.output(dict(b.noisy), SoftRounding.hard_values, 0.0), b.targets) for b in batches]
        return float(torch.stack(errors).mean())
