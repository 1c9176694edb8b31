"""Reconstruction of a whole net: unit after unit, each on what the quantized units before it give; can be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhyvit._tensors import pack, unpack
from qhyvit.errors import RecipeError
from qhyvit.graph.blocks import Unit
from qhyvit.methods.base import Problem
from qhyvit.progress import task
from qhyvit.quantized import Parameters
from qhyvit.search.prefix import Prefix, first_batches
from qhyvit.search.reconstruction import Batch, Settings, UnitLearner

Learn = Callable[[Prefix, Unit, torch.Generator], tuple[float, float, list[str]]]


def reconstruct(
    problem: Problem,
    parameters: Parameters,
    units: tuple[Unit, ...],
    settings: Settings,
    *,
    pictures: int,
    state: str | None = None,
) -> list[dict[str, Any]]:
    """Learn all units that hold layers, in order.

    Args:
        problem: the net.
        parameters: scales and zero points; gains codes and steps.
        units: what is learned together.
        settings: how each is learned.
        pictures: of the calibration pictures, at most.
        state: folder that keeps what finished units have learned; a later run with the same recipe goes on from there.

    Returns:
        One JSON-able entry per unit: its modules, and the share of its outputs' square that is lost before and after.

    Raises:
        RecipeError: if the folder cannot be used, or holds what another recipe or net has learned.
    """

    def learn(prefix: Prefix, unit: Unit, generator: torch.Generator) -> tuple[float, float, list[str]]:
        nodes = [n for n in prefix.nodes if n.name in set(unit.nodes)]
        learner = UnitLearner(prefix.execution, nodes, unit, settings, generator)
        before, after = learner.run(unit_batches(prefix, unit))
        return before, after, list(learner.steps)

    kept = State(state, problem, settings) if state is not None else None
    return walk_units(problem, parameters, units, learn, pictures=pictures, batch=settings.batch, kept=kept)


def walk_units(
    problem: Problem,
    parameters: Parameters,
    units: tuple[Unit, ...],
    learn: Learn,
    *,
    pictures: int,
    batch: int,
    kept: State | None = None,
    leave: Callable[[Unit], None] = lambda unit: None,
) -> list[dict[str, Any]]:
    """Go through a net unit by unit, learn those that hold layers, and run both networks on.

    Args:
        problem: the net.
        parameters: what is known of it so far.
        units: in the order of the graph.
        learn: learns one unit, whose inputs have been run: writes codes, scales and biases, and returns the error
            before and after, and the values whose activation steps it changed.
        pictures: of the calibration pictures, at most.
        batch: pictures that are run together.
        kept: what finished units have learned.
        leave: called for every unit, learned, taken over or without layers, before it is run.

    Returns:
        One JSON-able entry per unit with layers: its modules, and both errors.
    """
    prefix = Prefix(problem, parameters, first_batches(problem.pictures(), pictures, batch))
    nodes = {n.name: n for n in prefix.nodes}
    sites = {s.node: s.module for s in problem.sites.weights}
    found: list[dict[str, Any]] = []
    with task("Reconstructing", sum(bool(set(u.layers) & set(sites)) for u in units)) as advance:
        for i, unit in enumerate(units):
            learned = [name for name in unit.layers if name in sites]
            modules = [sites[n] for n in learned]
            if learned and not (kept is not None and kept.restore(i, parameters, modules, found)):
                generator = torch.Generator().manual_seed(problem.recipe.seed + i)
                before, after, steps = learn(prefix, unit, generator)
                found.append({"modules": modules, "before": before, "after": after})
                if kept is not None:
                    kept.keep(i, parameters, learned, steps, found[-1])
            leave(unit)
            prefix.advance([nodes[n] for n in unit.nodes])
            advance(bool(learned))
    return found


@torch.no_grad()
def unit_batches(prefix: Prefix, unit: Unit) -> list[Batch]:
    """What a unit whose inputs have been run is learned from."""
    nodes, found = {n.name: n for n in prefix.nodes}, []
    for i in range(prefix.batches):
        noisy, clean = ({name: values[name][i] for name in unit.inputs} for values in (prefix.noisy, prefix.clean))
        values = dict(clean)
        for name in unit.nodes:
            values[name] = prefix.execution.float_value(nodes[name], values)
        targets = [values[name] for name in unit.outputs if isinstance(values[name], Tensor)]
        found.append(Batch(noisy, clean, targets))
    return found


class State:
    """A folder with one safetensors file per finished unit.

    Args:
        folder: made if it does not exist.
        problem: whose recipe and weights the files belong to.
        settings: of the learning; told apart by their `repr`.
    """

    def __init__(self, folder: str, problem: Problem, settings: object) -> None:
        self.folder = Path(folder).expanduser()
        digest = hashlib.sha256(problem.recipe.to_yaml().encode() + repr(settings).encode())
        for name, tensor in sorted(problem.graph.named_buffers()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        self.digest = digest.hexdigest()
        mark = self.folder / "recipe.sha256"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not mark.exists():
                mark.write_text(self.digest, encoding="utf-8")
            same = mark.read_text(encoding="utf-8") == self.digest
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe key 'options.state': folder {folder} cannot be used: {error}.") from None
        if not same:
            raise RecipeError(
                f"recipe key 'options.state': folder {folder} belongs to another recipe or net; name an empty one."
            )

    def keep(
        self, unit: int, parameters: Parameters, layers: list[str], steps: list[str], entry: dict[str, Any]
    ) -> None:
        """Write what a unit has learned, whole or not at all."""
        tensors = {f"codes.{n}": parameters.codes[n] for n in layers if n in parameters.codes}
        tensors |= {f"bias.{n}": parameters.biases[n] for n in layers if n in parameters.biases}
        tensors |= {f"weight_scale.{n}": parameters.weights[n].scale for n in layers}
        tensors |= {f"weight_zero.{n}": parameters.weights[n].zero_point for n in layers}
        tensors |= {f"step.{n}": parameters.uniform(n).scale for n in steps}
        tensors["error"] = torch.tensor([entry["before"], entry["after"]], dtype=torch.float64)
        path, (data, _) = self._path(unit), pack({n: t.contiguous() for n, t in tensors.items()})
        beside = path.with_name(path.name + ".part")
        beside.write_bytes(data)
        beside.replace(path)

    def restore(self, unit: int, parameters: Parameters, modules: list[str], report: list[dict[str, Any]]) -> bool:
        """Take over what an earlier run learned of a unit; False if it did not get there."""
        path = self._path(unit)
        if not path.exists():
            return False
        try:
            tensors = unpack(path.read_bytes(), {})
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe key 'options.state': file {path} is damaged ({error}); delete it.") from None
        for name, tensor in tensors.items():
            kind, _, node = name.partition(".")
            if kind == "codes":
                parameters.codes[node] = tensor
            elif kind == "bias":
                parameters.biases[node] = tensor
            elif kind == "weight_scale":
                parameters.weights[node].scale.copy_(tensor)
            elif kind == "weight_zero":
                parameters.weights[node].zero_point.copy_(tensor)
            elif kind == "step":
                parameters.uniform(node).scale.copy_(tensor)
        before, after = tensors["error"].tolist()
        report.append({"modules": modules, "before": before, "after": after})
        return True

    def _path(self, unit: int) -> Path:
        return self.folder / f"unit_{unit:04d}.safetensors"
