"""A target: what a runtime executes in integers, how a model is written for it, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qhyvit.errors import TargetError
from qhyvit.quantized import QuantizedModel
from qhyvit.recipe import Recipe


class Session(Protocol):
    """A loaded model file."""

    def run(self, images: Tensor) -> Tensor:
        """Logits (n, classes) float32 of pictures (n, 3, H, W)."""
        ...

    def operators(self) -> tuple[int, int]:
        """How many computing operators of the *optimised* graph run in integers, and how many in float."""
        ...


@dataclass(frozen=True)
class Target:
    """The rules of one runtime. They limit a method's search before it begins.

    Attributes:
        name: as in recipes.
        description: one line.
        quantized_outputs: operator kinds that only run in integers if their output is quantized too.
        weight_bits, activation_bits: widths with integer kernels (any width up to the largest is stored in its type).
        asymmetric_weights: whether weights may have a zero point.
        per_channel_activations: whether an activation may have a scale per channel.
        formats: kinds of quantizers that it executes for activations; None: all.
        operators: kinds of integer operators that it executes (see `qhyvit.operators`); None: all.
        integer_bias: whether biases are int32.
        file_name: of the exported model; None where nothing is exported.
        prepare: completes a recipe for the machine at hand (saturation), the identity for most.
        settle: changes the quantizers that a method found to what the kernels compute with, nothing for most.
        export: writes the model to a path; the flag chooses the integer (True) or the float model.
        load: opens a written file, with so many threads (None: the runtime's default).
    """

    name: str
    description: str
    quantized_outputs: frozenset[str] = frozenset()
    weight_bits: frozenset[int] = frozenset(range(2, 17))
    activation_bits: frozenset[int] = frozenset(range(2, 17))
    asymmetric_weights: bool = True
    per_channel_activations: bool = True
    formats: frozenset[str] | None = None
    operators: frozenset[str] | None = None
    integer_bias: bool = False
    file_name: str | None = None
    prepare: Callable[[Recipe], Recipe] = lambda recipe: recipe
    settle: Callable[[QuantizedModel], None] = lambda model: None
    export: Callable[[QuantizedModel, Path, bool], None] | None = None
    load: Callable[[Path, int | None], Session] | None = None

    def has_format(self, kind: str) -> bool:
        """Whether it executes activations of this kind of quantizer."""
        return self.formats is None or kind in self.formats

    def has_operator(self, kind: str) -> bool:
        """Whether it executes this kind of integer operator."""
        return self.operators is None or kind in self.operators

    def check_parameters(self, model: QuantizedModel) -> None:
        """Refuse by name the quantizers that this target cannot execute.

        Raises:
            TargetError: names the layer, the format and the way out.
        """
        modules = {s.value: s.module for s in model.sites.activations}
        for value, quantizer in model.parameters.activations.items():
            problem = None
            if not self.has_format(quantizer.kind):
                problem = f"activations of format {quantizer.kind}"
            elif quantizer.axis is not None and not self.per_channel_activations:
                problem = "activations with a scale per channel"
            if problem:
                raise TargetError(
                    f"Target {self.name} has no kernel for {problem}, which method {model.recipe.method} chose in "
                    f"layer {modules[value]}; quantize for target {self.name} instead, and the method will do without."
                )
        for node, operator in model.parameters.operators.items():
            if not self.has_operator(operator.kind):
                raise TargetError(
                    f"Target {self.name} has no kernel for {operator.kind}, which method {model.recipe.method} chose "
                    f"in layer {model.nodes[node].meta['module']}; quantize for target {self.name}."
                )

    def check(self, recipe: Recipe, modules: list[str]) -> None:
        """Refuse by name what this target cannot execute.

        Args:
            recipe: as the user gave it.
            modules: names of the layers to be quantized.

        Raises:
            TargetError: names the layer, the setting and the way out.
        """
        for module in modules:
            asked = recipe.for_layer(module)
            problem = None
            if asked.weight_bits < 32 and asked.weight_bits not in self.weight_bits:
                problem = f"{asked.weight_bits}-bit weights"
            elif asked.activation_bits < 32 and asked.activation_bits not in self.activation_bits:
                problem = f"{asked.activation_bits}-bit activations"
            elif self.export is not None and (asked.weight_bits < 32) != (asked.activation_bits < 32):
                # runtimes quantize the other side themselves then, so the simulation would tell something else
                problem = f"{'weights' if asked.weight_bits < 32 else 'activations'} quantized alone"
            elif asked.weights.scheme == "asymmetric" and not self.asymmetric_weights:
                problem = "asymmetric weights"
            elif asked.activations.granularity == "per-channel" and not self.per_channel_activations:
                problem = "per-channel activation scales"
            if problem:
                where = f"layer {module}" if module else "the outermost module"
                raise TargetError(
                    f"Target {self.name} has no integer kernel for {problem}, asked for in {where}; change the "
                    "recipe, leave that layer float with an override, or use target simulate."
                )
