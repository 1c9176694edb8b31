"""Run a comparison: what is missing in the cache, in as many processes as asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from joblib import Parallel, delayed, parallel_config
from torch import nn

from qhyvit.comparison.cache import Store, checksum, data_facts, decisive, model_facts
from qhyvit.comparison.grid import Cell, Variant, ablation, cells
from qhyvit.comparison.peers import BITS as PEERS_BITS
from qhyvit.comparison.peers import PEERS
from qhyvit.comparison.subjects import Shared, calibration_data, captured, evaluation_data, read_subject
from qhyvit.comparison.table import Comparison, Outcome
from qhyvit.comparison.worker import Job, run_job, torch_threads
from qhyvit.data.dataset import Dataset
from qhyvit.errors import QhyvitError
from qhyvit.methods import METHODS
from qhyvit.models.load import DEMO, LoadedModel, load_model
from qhyvit.progress import hidden, task
from qhyvit.recipe import Recipe

METHODS_COMPARED = ("minmax", "percentile", "mse", "qhyvit")
BITS, SEEDS = ("w8a8", "w6a6", "w4a4"), 3
Model = str | nn.Module | LoadedModel


def compare(
    models: Model | Sequence[Model] = DEMO,
    *,
    methods: Sequence[str | Variant] | str | None = None,
    bits: Sequence[str] = BITS,
    scopes: Sequence[str] = ("partial",),
    seeds: int | Sequence[int] = SEEDS,
    stress: Sequence[str] = ("none",),
    ablate: bool = False,
    peers: bool = False,
    calib: str | Path | Dataset | None = None,
    data: str | Path | Dataset | None = None,
    limit: int | None = None,
    recipe: Recipe | str | Path | None = None,
    weights: str | Path | Sequence[str | Path] | None = None,
    pretrained: bool = False,
    input_size: int | None = None,
    cache: str | Path | None = None,
    jobs: int = 1,
    threads: int = 1,
    backend: str = "loky",
    on_cell: Callable[[Cell, Outcome], None] | None = None,
    **changes: Any,
) -> Comparison:
    """Quantize every net with every method, width, scope and seed, and score the simulations on the same pictures.

    Each seed draws its own calibration pictures, the same for every method. A cell that fails with a `QhyvitError` is
    recorded and does not stop the rest. Results do not depend on `jobs`.

    Args:
        models: as for `quantize`, one or several.
        methods: names, with options as in "qhyvit:variant=paper", or `Variant`s; "all". Default: minmax, percentile,
            mse, qhyvit; none beside the ablation. Also names of peers (`comparison.peers`): "ort-quantize-static".
        bits: recipe key.
        scopes: recipe key `scope`.
        seeds: how many (0, 1, …), or which.
        stress: "none" and twins as in `load_model`: "ranges:30".
        ablate: add the steps of Q-HyViT (`ablation`).
        peers: add all peers: other quantizers, at w8a8, each scored as its own runtime runs it.
        calib: calibration pictures, as for `quantize`.
        data: evaluation pictures, as for `evaluate`.
        limit: score so many pictures, drawn with a fixed seed.
        recipe: for all else.
        weights: for each model its file, in the same order.
        pretrained: take the published weights.
        input_size: side of the pictures.
        cache: folder for finished cells; a run that was stopped goes on from there. None: nothing is kept.
        jobs: processes; -1: as many as there are cores.
        threads: of torch in each process.
        backend: of joblib: "loky", "multiprocessing", "dask", "ray".
        on_cell: called with each cell when it is done.
        changes: recipe keys to change, for instance `target="simulate"`.

    Returns:
        The cells and their outcomes; `.rows`, `.to_markdown()`, `.save(folder)`.

    Raises:
        QhyvitError: on a wrong name or option, a peer that is not installed, a net or pictures that cannot be loaded,
            or if every cell that was run failed.
    """
    base = (recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe) if recipe else Recipe()).updated(
        **changes
    )
    if jobs == 0 or threads < 1:
        raise QhyvitError(f"jobs is {jobs} and threads {threads}; both must be at least 1 (jobs -1: all cores).")
    _check_backend(backend)
    named: list[Model] = [models] if isinstance(models, Model) else list(models)
    labels = _labels(named)
    grid = cells(
        labels,
        _variants(methods, ablate, peers),
        bits=bits,
        scopes=scopes,
        seeds=range(seeds) if isinstance(seeds, int) else seeds,
        stress=stress,
        recipe=base,
    )
    loaded = _load(named, labels, weights, base.seed, pretrained=pretrained, input_size=input_size)
    with TemporaryDirectory(prefix="qhyvit-compare-") as scratch, torch_threads(threads):
        store = Store(Path(cache).expanduser() if cache is not None else Path(scratch) / "cells")
        plan = _Plan(grid, loaded, calib, data, limit, store)
        waiting = [cell for cell in grid if cell not in plan.outcomes]
        try:
            with task("Comparing", len(grid)) as advance, hidden():
                advance(len(plan.outcomes))
                for cell, outcome in _run(plan, waiting, Shared(Path(scratch)), jobs, threads, backend):
                    plan.outcomes[cell] = outcome
                    advance(1)
                    if on_cell is not None:
                        on_cell(cell, outcome)
        finally:
            read_subject.cache_clear()  # it holds files of the scratch folder open
    result = Comparison({cell: plan.outcomes[cell] for cell in grid}, plan.facts, plan.reused)
    if result.failed and not any(outcome.scored for outcome in result.outcomes.values()):
        cell, sentence = next(iter(result.failed.items()))
        raise QhyvitError(f"Every cell failed; the first, {cell}: {sentence}")
    return result


def _variants(methods: Sequence[str | Variant] | str | None, ablate: bool, peers: bool) -> list[Variant]:
    if methods is None:
        methods = () if ablate else METHODS_COMPARED
    given = [methods] if isinstance(methods, str) else list(methods)
    named = [name for m in given for name in (list(METHODS) if m == "all" else [m])]
    named += list(PEERS) if peers else []
    return [*(ablation() if ablate else ()), *(m if isinstance(m, Variant) else Variant.parse(m) for m in named)]


def _labels(models: Sequence[Model]) -> list[str]:
    """Names for the table, each once."""
    found: list[str] = []
    for model in models:
        name = model if isinstance(model, str) else getattr(model, "name", type(model).__name__)
        same = sum(label == name or label.startswith(f"{name} #") for label in found)
        found.append(f"{name} #{same + 1}" if same else str(name))
    return found


def _load(
    models: Sequence[Model],
    labels: Sequence[str],
    weights: str | Path | Sequence[str | Path] | None,
    seed: int,
    **options: Any,
) -> dict[str, LoadedModel | QhyvitError]:
    """Nets by label, captured; the error where that cannot be done."""
    files: list[str | Path | None] = [weights] if isinstance(weights, str | Path) else list(weights or ())
    files = files or [None] * len(models)
    if len(files) != len(models):
        raise QhyvitError(f"There are {len(models)} models but {len(files)} weights files; give one for each model.")
    found: dict[str, LoadedModel | QhyvitError] = {}
    for label, model, file in zip(labels, models, files, strict=True):
        if not isinstance(model, LoadedModel):
            model = load_model(model, weights=file, seed=seed, **options)
        try:
            found[label] = captured(model)
        except QhyvitError as error:
            found[label] = error
    return found


def _check_backend(name: str) -> None:
    if name == "threading":
        raise QhyvitError("Backend threading would mix the cells' random numbers; take loky.")
    try:
        if name == "ray":  # brings its backend, but joblib has to be told
            importlib.import_module("ray.util.joblib").register_ray()
        with parallel_config(backend=name):
            pass
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise QhyvitError(f"joblib has no backend {name!r} here ({reason}); take loky, or install it.") from None


class _Plan:
    """Which cells are known already, and what decides the others."""

    def __init__(
        self,
        grid: Sequence[Cell],
        loaded: dict[str, LoadedModel | QhyvitError],
        calib: str | Path | Dataset | None,
        data: str | Path | Dataset | None,
        limit: int | None,
        store: Store,
    ) -> None:
        self.store, self.limit, self.reused = store, limit, 0
        self.loaded: dict[str, LoadedModel] = {}
        self.evaluation: dict[str, tuple[Dataset, bool]] = {}
        self.calibration: dict[str, Dataset] = {}
        self.decides: dict[Cell, dict[str, Any]] = {}
        self.outcomes: dict[Cell, Outcome] = {}
        recipe, broken, models = grid[0].recipe, {}, {}
        for label, model in loaded.items():
            try:
                if isinstance(model, QhyvitError):
                    raise model
                self.evaluation[label] = evaluation_data(model, data)
                self.calibration[label] = calibration_data(model, calib, recipe)
                models[label] = model_facts(model)
                self.loaded[label] = model
            except QhyvitError as error:
                broken[label] = Outcome(error=str(error))
        source = recipe.calibration.source if calib is None else calib
        drawn = {n: data_facts(d, source, None) for n, d in self.calibration.items()}
        scored = {n: data_facts(d, data, limit) for n, (d, _) in self.evaluation.items()}
        for cell in grid:
            if cell.model in broken:
                self.outcomes[cell] = broken[cell.model]
                continue
            if cell.peer is not None and cell.recipe.bits != PEERS_BITS:
                self.outcomes[cell] = Outcome(skipped="peers only know 8 bits.")
                continue
            self.decides[cell] = decisive(cell, models[cell.model], drawn[cell.model], scored[cell.model])
            found = store.get(checksum(self.decides[cell]))
            if found is not None:
                self.outcomes[cell] = found
                self.reused += 1
        self.facts = self._facts(grid)

    def _facts(self, grid: Sequence[Cell]) -> dict[str, str]:
        scored = dict.fromkeys(f"{min(self.limit or len(d), len(d))} of {d.name}" for d, _ in self.evaluation.values())
        size = grid[0].recipe.calibration.size
        drawn = dict.fromkeys(f"{min(size, len(d))} of {d.name}" for d in self.calibration.values())
        targets = dict.fromkeys(cell.recipe.target for cell in grid if cell.peer is None)
        facts = {"evaluation": scored, "calibration": drawn, "target": targets}
        return {key: ", ".join(values) for key, values in facts.items() if values}


def _run(
    plan: _Plan, waiting: Sequence[Cell], shared: Shared, jobs: int, threads: int, backend: str
) -> Iterator[tuple[Cell, Outcome]]:
    """Each cell with its outcome, in the order in which they end; cells that the same things decide are one job."""
    same: dict[str, list[Cell]] = {}
    for cell in waiting:
        same.setdefault(checksum(plan.decides[cell]), []).append(cell)
    groups, ready = list(same.values()), []
    for number, group in enumerate(groups):
        cell = group[0]
        model = plan.loaded[cell.model]
        try:
            pictures = shared.evaluation(model, *plan.evaluation[cell.model], plan.limit)
            subject = shared.subject(cell.model, model, cell.stress, pictures)
            calibration = shared.calibration(model, plan.calibration[cell.model], cell.recipe)
        except QhyvitError as error:
            yield from ((cell, Outcome(error=str(error))) for cell in group)
            continue
        decides = plan.decides[cell]
        ready.append(Job(number, cell.recipe, subject, calibration, plan.store.folder, decides, threads, cell.peer))
    with parallel_config(backend=backend, n_jobs=jobs):
        for number, outcome in Parallel(return_as="generator_unordered")(delayed(run_job)(job) for job in ready):
            yield from ((cell, outcome) for cell in groups[number])
