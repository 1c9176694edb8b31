"""FQ-ViT (Lin, Zhang, Sun, Li, Zhou, arXiv 2111.13824): power-of-two factors before norms, log-int-softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from qhyvit.methods.base import Problem, with_settings
from qhyvit.methods.formats import Formats
from qhyvit.methods.integer_parts import integer_norms, integer_softmax, power_of_two_factors
from qhyvit.methods.options import read_options
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import Parameters


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        ranges: how ranges are set.
        factors: the largest exponent K of the power-of-two factors; 0: none.
        softmax_bits: width of softmax outputs; None: that of all activations.
        integer_softmax: whether softmax outputs are powers of two, in integers where possible.
        integer_norms: whether LayerNorms with power-of-two factors are computed in integers.
    """

    ranges: Literal["minmax", "percentile", "mse"] = "minmax"
    factors: Annotated[int, Field(ge=0, le=7)] = 3
    softmax_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    integer_softmax: bool = True
    integer_norms: bool = True


def fqvit(problem: Problem) -> Parameters:
    """FQ-ViT: min-max ranges, power-of-two factors for inputs of norms, softmax and LayerNorm in integers.

    Lin et al., IJCAI 2022, arXiv 2111.13824. Weights symmetric per output channel, activations asymmetric per tensor,
    min-max. Made for scope full: inputs of LayerNorm (here also of GroupNorm) have one scale s·2^(k_c), k_c = 0..3, per
    channel, chosen by squared error; the norm runs in integers with an 8-bit multiplier and a shift; softmax runs in
    integers on the scores' codes with a polynomial exponential and gives powers of two (log-int-softmax).

    Other than the released code: factors come from positions of all pictures, not from the last batch; ε enters the
    integer norm; the input picture is quantized.

    Options (defaults): ranges minmax, factors 3, softmax_bits null (that of the activations; the paper also has 4),
    integer_softmax true, integer_norms true.
    """
    options = read_options(Options, "fqvit", problem.recipe.options)
    formats = Formats(problem, "fqvit")
    settings = with_settings(
        problem,
        weights={"granularity": "per-channel", "scheme": "symmetric"},
        activations={"granularity": "per-tensor", "scheme": "asymmetric"},
    )
    parameters = set_ranges(settings, options.ranges)
    if problem.recipe.scope != "full":
        parameters.notes.append("fqvit is made for scope full; in scope partial norms and scores stay float")
    if options.factors:
        power_of_two_factors(settings, parameters, formats, "fqvit", options.factors)
    if options.integer_norms:
        integer_norms(settings, parameters)
    if options.integer_softmax:
        integer_softmax(settings, parameters, formats, "fqvit", "polynomial", options.softmax_bits)
    parameters.notes += formats.notes()
    return parameters
