"""What a method may use on the recipe's target, and what stands in for the rest, by name."""

from __future__ import annotations

import torch

from qhyvit.graph.sites import ActivationSite
from qhyvit.methods.base import Problem, with_settings
from qhyvit.methods.ranges import activation_quantizer
from qhyvit.quantizers.uniform import Scheme, UniformAffine, uniform_from_range


class Formats:
    """Asks the target for number formats and keeps a record of those it does not have.

    Args:
        problem: whose recipe names the target.
        method: for messages.
    """

    def __init__(self, problem: Problem, method: str) -> None:
        self._problem, self._method, self._target = problem, method, problem.target
        self._replaced: dict[tuple[str, str], int] = {}

    def has(self, kind: str, stand_in: str) -> bool:
        """Whether the target executes a kind of quantizer or integer operator.

        Args:
            kind: its name.
            stand_in: what the caller takes otherwise, as the end of a sentence; written down once for each call.
        """
        if self._target.has_format(kind) and self._target.has_operator(kind):
            return True
        self._replaced[kind, stand_in] = self._replaced.get((kind, stand_in), 0) + 1
        return False

    def has_for_softmax(self, kind: str, site: ActivationSite) -> bool:
        """As `has`, for the output of a softmax, where `softmax_stand_in` is taken otherwise."""
        bits = self._problem.bits(site).activation_bits
        step = f"step 1/{(1 << bits) - 1}" if bits >= 8 else "the step of least squared error"
        return self.has(kind, f"softmax outputs are uint{bits} with {step} and zero point 0")

    def has_channels(self, stand_in: str) -> bool:
        """Whether the target executes activations with one scale per channel."""
        if self._target.per_channel_activations:
            return True
        self._replaced["scales per channel", stand_in] = self._replaced.get(("scales per channel", stand_in), 0) + 1
        return False

    def weight_scheme(self, wanted: Scheme) -> Scheme:
        """The scheme of weights: symmetric where the target takes no other."""
        if wanted == "symmetric" or self._target.asymmetric_weights:
            return wanted
        self._replaced["asymmetric weights", "they are symmetric"] = 0
        return "symmetric"

    def notes(self) -> list[str]:
        """A sentence for each thing that was replaced."""
        return [
            f"{self._method}: target {self._target.name} has no kernel for {kind}; "
            f"{f'{count} ' if count else ''}{stand_in} instead"
            for (kind, stand_in), count in self._replaced.items()
        ]


def softmax_stand_in(problem: Problem, site: ActivationSite) -> UniformAffine:
    """Unsigned, zero point 0: step 1/255 at 8 bits; with fewer, the step of least squared error."""
    bits = problem.bits(site).activation_bits
    if bits < 8:
        settings = {"granularity": "per-tensor", "scheme": "asymmetric"}
        return activation_quantizer(
            with_settings(problem, activations=settings), site, problem.statistics[site.value], "mse"
        )
    return uniform_from_range(torch.zeros(()), torch.ones(()), bits=bits, scheme="asymmetric", signed=False)
