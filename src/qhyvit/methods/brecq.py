"""BRECQ (Li et al., ICLR 2021, arXiv 2102.05426): rounding learned by the output error of whole blocks."""

from __future__ import annotations

from dataclasses import dataclass

from qhyvit.methods import qdrop
from qhyvit.methods.base import Problem
from qhyvit.methods.options import read_options
from qhyvit.quantized import Parameters


@dataclass(frozen=True)
class Options(qdrop.Options):
    """Those of `qdrop.Options`; no number stays float."""

    drop: float = 0.0


def brecq(problem: Problem) -> Parameters:
    """BRECQ: rounding and activation steps of a block learned by the squared error of the block's output.

    Li et al., ICLR 2021, arXiv 2102.05426, without the weights from the task's gradient. Blocks in order, inputs from
    the quantized net, targets from the float net. It is QDrop with probability 0.

    Other than the paper: weights and activation steps are learned together, not one after the other; 400 iterations at
    rate 1e-2, 128 pictures, batch 16; blocks are found in the graph, bridge blocks are blocks of their own.

    Options (defaults): base mse, iterations 400, batch 16, rate 0.01, step_rate 4e-5, weight 0.01, warmup 0.2,
    drop 0, pictures 128, state none.
    """
    return qdrop.learned(problem, "brecq", read_options(Options, "brecq", problem.recipe.options))
