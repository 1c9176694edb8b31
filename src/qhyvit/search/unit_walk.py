"""Reconstruction of a whole net: unit after unit, each on what the quantized units before it give; can be resumed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
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
from qhyvit.search.reconstruction import Settings, UnitLearner


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
        pictures: of the calibration pictures, at most; whole batches.
        state: folder that keeps what finished units have learned; a later run with the same recipe goes on from there.

    Returns:
        One JSON-able entry per unit: its modules, and the share of its outputs' square that is lost before and after.

    Raises:
        RecipeError: if the folder cannot be used, or holds what another recipe or net has learned.
    """
    batch = min(settings.batch, pictures, problem.picture_count)
    settings = replace(settings, batch=batch)
    batches = [b for b in first_batches(problem, pictures, batch) if len(b) == batch]
    prefix = Prefix(problem, parameters, batches)
    nodes = {n.name: n for n in prefix.nodes}
    sites = {s.node: s.module for s in problem.sites.weights}
    kept = State(state, problem, settings) if state is not None else None
    found: list[dict[str, Any]] = []
    with task("Reconstructing", sum(bool(set(u.layers) & set(sites)) for u in units)) as advance:
        for i, unit in enumerate(units):
            learned = [name for name in unit.layers if name in sites]
            if learned and not (kept is not None and kept.restore(i, parameters, [sites[n] for n in learned], found)):
                generator = torch.Generator().manual_seed(problem.recipe.seed + i)
                learner = UnitLearner(prefix.execution, [nodes[n] for n in unit.nodes], unit, settings, generator)
                noisy, clean = ({n: _joined(v[n]) for n in unit.inputs} for v in (prefix.noisy, prefix.clean))
                before, after = learner.run(noisy, clean, _targets(prefix, unit))
                found.append({"modules": [sites[n] for n in learned], "before": before, "after": after})
                if kept is not None:
                    kept.keep(i, parameters, learned, list(learner.steps), found[-1])
            prefix.advance([nodes[n] for n in unit.nodes])
            advance(bool(learned))
    return found


def _joined(batches: list[Any]) -> Any:
    """All pictures together; what is no tensor (a batch size) is the same in every batch."""
    return torch.cat(batches) if isinstance(batches[0], Tensor) else batches[0]


@torch.no_grad()
def _targets(prefix: Prefix, unit: Unit) -> list[Tensor]:
    """The unit's outputs in the float network."""
    nodes, found = {n.name: n for n in prefix.nodes}, []
    for i in range(prefix.batches):
        values = {name: prefix.clean[name][i] for name in unit.inputs}
        for name in unit.nodes:
            values[name] = prefix.execution.float_value(nodes[name], values)
        found.append([values[name] for name in unit.outputs if isinstance(values[name], Tensor)])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


class State:
    """A folder with one safetensors file per finished unit.

    Args:
        folder: made if it does not exist.
        problem: whose recipe and weights the files belong to.
        settings: of the learning.
    """

    def __init__(self, folder: str, problem: Problem, settings: Settings) -> None:
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
            elif kind == "step":
                parameters.uniform(node).scale.copy_(tensor)
        before, after = tensors["error"].tolist()
        report.append({"modules": modules, "before": before, "after": after})
        return True

    def _path(self, unit: int) -> Path:
        return self.folder / f"unit_{unit:04d}.safetensors"
