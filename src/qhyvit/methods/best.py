"""The methods' parts put together, for little loss whatever the net."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch

from qhyvit.calibration.bias import correct_biases
from qhyvit.graph.ops import copy_graph
from qhyvit.methods.base import Problem
from qhyvit.methods.erq import Base, compensate, on_base
from qhyvit.methods.erq import Options as Compensation
from qhyvit.methods.options import read_options
from qhyvit.quantized import Parameters, QuantizedModel

VIEWS = 8  # of each calibration picture at most, where the last layers see few numbers of each to fit weights to
PIXELS = 1 << 20  # of all views together
ROWS = 1.0  # positions for each input of a layer; with fewer its weights stay
CLEARLY = 0.93  # of the other's error, 0.3 dB: less than that tells nothing about other pictures


@dataclass(frozen=True)
class Options:
    """The method's options, with their defaults.

    Attributes:
        base: method that sets scales and zero points, with its own defaults. "auto": qhyvit and mse are both carried
            through; mse is kept where it is clearly closer to the float net on the calibration pictures.
    """

    base: Base | Literal["auto"] = "auto"


def best(problem: Problem) -> Parameters:
    """Search of qhyvit, then weights refitted and rounded to make up for each other (erq), then biases corrected.

    In this order: channels evened out, scales, granularities and schemes by reconstruction error, bridge blocks (method
    qhyvit); each layer's weights refitted in closed form to the quantized inputs that the layers before it give, and
    rounded so that they make up for each other (method erq, arXiv 2407.06794), over random crops of small pictures too;
    biases by the error behind activation functions. The same once more from ranges of method mse, which takes little
    time and is kept where it leaves the logits clearly closer to the float net's on the calibration pictures: plain
    ranges can be better once weights are refitted.

    Options (defaults): base auto.
    """
    asked = read_options(Options, "best", problem.recipe.options).base
    bases: tuple[Base, ...] = ("qhyvit", "mse") if asked == "auto" else (asked,)
    tried = [_carried_through(problem, base) for base in bases]
    first, last = tried[0], tried[-1]
    found = last if last.error < CLEARLY * first.error else first
    problem.graph, problem.sites = found.problem.graph, found.problem.sites
    if len(bases) > 1:
        scores = ", ".join(f"{a.base} {-10 * math.log10(a.error):.1f} dB" for a in tried)
        found.parameters.notes.append(f"best: ranges of {found.base} kept; on the calibration pictures {scores}")
    return found.parameters


@dataclass(frozen=True)
class _Attempt:
    base: Base
    problem: Problem
    parameters: Parameters
    error: float


def _carried_through(problem: Problem, base: Base) -> _Attempt:
    """From one base's ranges to compensated weights, on a copy of the graph."""
    own = copy.copy(problem)
    own.graph = copy_graph(problem.graph)
    parameters = on_base(own, base)
    compensate(own, parameters, Compensation(views=_views(problem), rows=ROWS))
    parameters.correct_biases = True
    return _Attempt(base, own, parameters, _error(own, parameters))


def _views(problem: Problem) -> int:
    """How many views of each picture to fit weights to: no more pixels than 16 pictures of 256×256 have."""
    height, width = next(problem.pictures()).shape[-2:]
    pictures = min(problem.picture_count, Compensation().pictures)
    return min(VIEWS, max(1, PIXELS // (pictures * height * width)))


def _error(problem: Problem, parameters: Parameters) -> float:
    """Squared error of the logits on the calibration pictures, biases corrected, as a share of their square.

    Computed as the target computes, rounded biases and all.
    """
    corrected = copy.copy(parameters)
    corrected.biases = dict(parameters.biases)
    model = QuantizedModel(problem.graph, problem.sites, corrected, problem.recipe, {}, problem.integer_bias)
    correct_biases(model, problem.pictures())
    simulation, signal, noise = model.simulation(), 0.0, 0.0
    with torch.no_grad():
        for images in problem.pictures():
            wanted = problem.graph(images).double()
            signal += float(wanted.square().sum())
            noise += float((simulation(images) - wanted).square().sum())
    tiny = 1e-30
    return noise / (signal + tiny) + tiny
