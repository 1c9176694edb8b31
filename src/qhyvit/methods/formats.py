"""What a method may use on the recipe's target, and what stands in for the rest, by name."""

from __future__ import annotations

import torch

from qhyvit.graph.sites import ActivationSite
from qhyvit.methods.base import Problem, with_settings
from qhyvit.methods.ranges import activation_quantizer
from qhyvit.quantizers.base import WIDEST
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

    def has(self, kind: str, stand_in: str, bits: int = 2) -> bool:
        """Whether the target executes a kind of quantizer or integer operator, in the width asked for.

        Args:
            kind: its name.
            stand_in: what the caller takes otherwise, as the end of a sentence; written down once for each call.
            bits: that it would have.
        """
        if bits > WIDEST:
            return self._replace(f"{kind} has at most {WIDEST} bits", stand_in)
        if self._target.has_format(kind) and self._target.has_operator(kind):
            return True
        return self._replace(self._no_kernel(kind), stand_in)

    def has_for_softmax(self, kind: str, site: ActivationSite, width: int | None = None) -> bool:
        """As `has`, for the output of a softmax (of another width), where `softmax_stand_in` is taken otherwise."""
        bits = self._problem.bits(site).activation_bits
        step = f"step 1/{(1 << bits) - 1}" if bits >= 8 else "the step of least squared error"
        return self.has(kind, f"softmax outputs are uint{bits} with {step} and zero point 0", width or bits)

    def has_channels(self, stand_in: str) -> bool:
        """Whether the target executes activations with one scale per channel."""
        if self._target.per_channel_activations:
            return True
        return self._replace(self._no_kernel("scales per channel"), stand_in)

    def weight_scheme(self, wanted: Scheme) -> Scheme:
        """The scheme of weights: symmetric where the target takes no other."""
        if wanted == "symmetric" or self._target.asymmetric_weights:
            return wanted
        self._replaced[self._no_kernel("asymmetric weights"), "they are symmetric"] = 0
        return "symmetric"

    def notes(self) -> list[str]:
        """A sentence for each thing that was replaced."""
        return [
            f"{self._method}: {why}; {f'{count} ' if count else ''}{stand_in} instead"
            for (why, stand_in), count in self._replaced.items()
        ]

    def _no_kernel(self, kind: str) -> str:
        return f"target {self._target.name} has no kernel for {kind}"

    def _replace(self, why: str, stand_in: str) -> bool:
        self._replaced[why, stand_in] = self._replaced.get((why, stand_in), 0) + 1
        return False


def softmax_stand_in(problem: Problem, site: ActivationSite) -> UniformAffine:
    """Unsigned, zero point 0: step 1/255 at 8 bits; with fewer, the step of least squared error."""
    bits = problem.bits(site).activation_bits
    if bits < 8:
        settings = {"granularity": "per-tensor", "scheme": "asymmetric"}
        return activation_quantizer(
            with_settings(problem, activations=settings), site, problem.statistics[site.value], "mse"
        )
    return uniform_from_range(torch.zeros(()), torch.ones(()), bits=bits, scheme="asymmetric", signed=False)
