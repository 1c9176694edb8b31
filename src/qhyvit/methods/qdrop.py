"""QDrop (Wei et al., ICLR 2022, arXiv 2203.05740): block reconstruction with activations that are float at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from qhyvit.graph.blocks import Unit, find_units
from qhyvit.methods.base import Problem
from qhyvit.methods.erq import Base, on_base
from qhyvit.methods.options import read_options
from qhyvit.quantized import Parameters
from qhyvit.search.reconstruction import Settings
from qhyvit.search.unit_walk import reconstruct


@dataclass(frozen=True)
class Options:
    """The options of the three reconstruction methods, with QDrop's defaults.

    Attributes:
        base: method that sets scales and zero points, with its own defaults.
        iterations: of Adam, per unit.
        batch: pictures that are run together, one batch per iteration.
        rate: learning rate of the rounding.
        step_rate: learning rate of the activation steps; 0 leaves them.
        weight: λ of the rounding's regularization.
        warmup: share of the iterations without it.
        drop: probability that a number stays float.
        pictures: of the calibration pictures, at most.
        state: folder that keeps finished units, so that a run that was stopped goes on.
    """

    base: Base = "mse"
    iterations: Annotated[int, Field(ge=1)] = 400
    batch: Annotated[int, Field(ge=1)] = 16
    rate: Annotated[float, Field(gt=0)] = 1e-2
    step_rate: Annotated[float, Field(ge=0)] = 4e-5
    weight: Annotated[float, Field(ge=0)] = 1e-2
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    pictures: Annotated[int, Field(ge=1)] = 128
    state: str | None = None


def qdrop(problem: Problem) -> Parameters:
    """QDrop: rounding and activation steps of a block learned by its output's error, half of the numbers float.

    Wei et al., ICLR 2022, arXiv 2203.05740. Blocks in order; inputs from the quantized net and, with probability 0.5
    for each number, from the float net; targets from the float net; rounding by AdaRound's h(v), activation steps by
    LSQ, jointly, Adam. A block whose error is not lower at the end keeps nearest rounding.

    Other than the paper: blocks are found in the graph, bridge blocks are blocks of their own; 400 iterations at rate
    1e-2 rather than 20,000 at 1e-3, 128 pictures, batch 16; ranges and steps start from method mse; the first and
    the last layer have the recipe's width and are learned too.

    Options (defaults): base mse, iterations 400, batch 16, rate 0.01, step_rate 4e-5, weight 0.01, warmup 0.2,
    drop 0.5, pictures 128, state none.
    """
    return learned(problem, "qdrop", read_options(Options, "qdrop", problem.recipe.options))


def learned(problem: Problem, name: str, options: Options, *, layers: bool = False) -> Parameters:
    """Base ranges, then reconstruction.

    Args:
        problem: the net.
        name: of the method, for the report.
        options: how.
        layers: learn each layer by its own output instead of whole blocks.
    """
    parameters = on_base(problem, options.base)
    settings = Settings(
        options.iterations,
        options.batch,
        options.rate,
        options.step_rate,
        options.weight,
        options.warmup,
        options.drop,
    )
    chosen = single_nodes(problem) if layers else find_units(problem.graph)
    report = reconstruct(problem, parameters, chosen, settings, pictures=options.pictures, state=options.state)
    parameters.report[name] = report
    better = sum(entry["after"] < entry["before"] for entry in report)
    parameters.notes.append(f"{name}: {better} of {len(report)} units have less error than with nearest rounding")
    return parameters


def single_nodes(problem: Problem) -> tuple[Unit, ...]:
    """Each node by itself, so that each layer is learned by its own output."""
    sites = {s.node for s in problem.sites.weights}
    return tuple(
        Unit(
            (n.name,),
            (n.name,) if n.name in sites else (),
            tuple(dict.fromkeys(i.name for i in n.all_input_nodes if i.op != "get_attr")),
            (n.name,),
        )
        for n in problem.graph.graph.nodes
        if n.op == "call_function"
    )
