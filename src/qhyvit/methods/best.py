"""The methods' parts put together, for little loss whatever the net."""

from __future__ import annotations

from dataclasses import dataclass

from qhyvit.methods.base import Problem
from qhyvit.methods.erq import Base, compensate, on_base
from qhyvit.methods.erq import Options as Compensation
from qhyvit.methods.options import read_options
from qhyvit.quantized import Parameters


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        base: method that sets scales and zero points, with its own defaults.
    """

    base: Base = "qhyvit"


def best(problem: Problem) -> Parameters:
    """Search of qhyvit, then weights refitted and rounded to make up for each other (erq), then biases corrected.

    In this order: channels evened out, scales, granularities and schemes by reconstruction error, bridge blocks (method
    qhyvit); each layer's weights refitted in closed form to the quantized inputs that the layers before it give, and
    rounded so that they make up for each other (method erq, arXiv 2407.06794); biases by the error behind activation
    functions.

    Options (defaults): base qhyvit.
    """
    parameters = on_base(problem, read_options(Options, "best", problem.recipe.options).base)
    compensate(problem, parameters, Compensation())
    parameters.correct_biases = True
    return parameters
