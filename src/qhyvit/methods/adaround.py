"""AdaRound (Nagel et al., ICML 2020, arXiv 2004.10568): each weight rounded up or down by its layer's output error."""

from __future__ import annotations

from dataclasses import dataclass

from qhyvit.methods import qdrop
from qhyvit.methods.base import Problem
from qhyvit.methods.options import read_options
from qhyvit.quantized import Parameters


@dataclass(frozen=True)
class Options(qdrop.Options):
    """Those of `qdrop.Options`; no number stays float, steps stay."""

    step_rate: float = 0.0
    drop: float = 0.0


def adaround(problem: Problem) -> Parameters:
    """AdaRound: whether each weight is rounded up or down is learned by the squared error of its layer's output.

    Nagel et al., ICML 2020, arXiv 2004.10568. h(v) = clip(1.2·σ(v) - 0.1, 0, 1), λ·Σ(1 - |2h - 1|^β), β from 20 to 2
    after a fifth of the iterations; layers in order, inputs from the quantized net, targets from the float net. A layer
    whose error is not lower at the end keeps nearest rounding.

    Other than the paper: 400 iterations at rate 1e-2 rather than 20,000 at 1e-3, 128 pictures, batch 16; inputs
    are quantized while weights are learned; errors and λ count as shares (of the output's square, and per weight).

    Options (defaults): base mse, iterations 400, batch 16, rate 0.01, step_rate 0, weight 0.01, warmup 0.2, drop 0,
    pictures 128, state none.
    """
    options = read_options(Options, "adaround", problem.recipe.options)
    return qdrop.learned(problem, "adaround", options, layers=True)
