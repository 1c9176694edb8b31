"""The main verb: a model and pictures in, a quantized model out."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qhyvit.calibration.bias import correct_biases, fit_biases
from qhyvit.data.dataset import Dataset, Part, open_builtin, open_dataset
from qhyvit.data.preprocessing import Preprocessing
from qhyvit.errors import DataError, ModelError, RecipeError, TargetError
from qhyvit.graph.capture import capture
from qhyvit.graph.ops import weight_of
from qhyvit.graph.sites import Sites, place
from qhyvit.methods import METHODS, Problem
from qhyvit.models.load import DEMO, LoadedModel, load_model, stressed
from qhyvit.quantized import QuantizedModel
from qhyvit.recipe import Recipe
from qhyvit.targets import TARGETS

KEPT_BYTES = 128 << 20  # calibration pictures up to this size stay in memory between passes


def quantize(
    model: str | nn.Module | LoadedModel = DEMO,
    *,
    calib: str | Path | Dataset | Tensor | None = None,
    recipe: Recipe | str | Path | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    input_size: int | None = None,
    stress: str | None = None,
    **changes: Any,
) -> QuantizedModel:
    """Quantize an image classifier after training.

    Args:
        model: "demo", a timm name, "package.module:builder", a module, or what `load_model` gave.
        calib: calibration pictures: a folder, zip, npz, built-in name ("flowers", "photos"), a `Dataset`, or a batch of
            preprocessed pictures (n, 3, H, W). Default: the recipe's, else the built-in set that fits the model.
        recipe: a `Recipe`, or a YAML file; default: W8A8, method qhyvit, target onnxruntime.
        weights: safetensors or state-dict file (the recipe's section `weights` is changed through `recipe`).
        pretrained: take timm's published weights.
        input_size: side of the pictures.
        stress: quantize a twin that is the same function in float but harder, as in `load_model`.
        changes: recipe keys to change, for instance `bits="w6a6"`, `method="percentile"`.

    Returns:
        The quantized model; `.simulation()` runs it, `save` writes it, `export` deploys it.

    Raises:
        QhyvitError: in one sentence, whatever hinders.

    Example:
        >>> quantized = qhyvit.quantize("mobilevit_xxs", weights="net.safetensors", calib="photos/")  # doctest: +SKIP
    """
    recipe = (recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(recipe) if recipe else Recipe()).updated(
        **changes
    )
    target, method = TARGETS[recipe.target], METHODS[recipe.method]
    recipe = target.prepare(recipe)
    if isinstance(calib, str | Path):  # so that the recipe, written beside the result, makes the result again
        recipe = recipe.updated(calibration={"source": str(calib)})
    if isinstance(model, LoadedModel):
        loaded = model if stress is None else stressed(model, stress)
    else:
        loaded = load_model(
            model, weights=weights, pretrained=pretrained, input_size=input_size, seed=recipe.seed, stress=stress
        )
    preprocessing = Preprocessing.from_config(loaded.preprocessing_config)

    torch.manual_seed(recipe.seed)
    graph = capture(loaded.module, torch.zeros(1, *preprocessing.input_size))

    def find_sites(captured: fx.GraphModule) -> Sites:
        return _wanted(
            place(
                captured,
                scope=recipe.scope,
                is_float=lambda module: min(_bits(recipe, module)) >= 32,
                quantized_outputs=target.quantized_outputs,
            ),
            recipe,
        )

    sites = find_sites(graph)
    target.check(recipe, sites.modules())
    _check_overrides(recipe, [str(n.meta.get("module", "")) for n in graph.graph.nodes])
    _check_weights(graph, sites)
    pictures = _pictures(recipe.calibration.source if calib is None else calib, loaded, recipe, preprocessing)
    problem = Problem(graph, sites, recipe, pictures.stream, pictures.count, find_sites)
    parameters = method(problem)
    parameters.notes += pictures.notes()
    info = {
        "model": loaded.name,
        "source": loaded.source,
        "trained": loaded.trained,
        "num_classes": loaded.num_classes,
        "class_names": list(loaded.class_names) if loaded.class_names else None,
        "preprocessing": preprocessing.to_dict(),
        "calibration": {"source": pictures.source, "pictures": pictures.read},
        "report": parameters.report,
    }
    quantized = QuantizedModel(problem.graph, problem.sites, parameters, recipe, info, problem.integer_bias)
    target.check_parameters(quantized)
    target.settle(quantized)
    fit_biases(quantized)
    if recipe.bias_correction or parameters.correct_biases:
        correct_biases(quantized, pictures.stream())
    return quantized


def _bits(recipe: Recipe, module: str) -> tuple[int, int]:
    layer = recipe.for_layer(module)
    return layer.weight_bits, layer.activation_bits


def _wanted(sites: Sites, recipe: Recipe) -> Sites:
    """Without the weights or the activations of layers that the recipe leaves float on that side only."""
    return Sites(
        tuple(s for s in sites.weights if recipe.for_layer(s.module).weight_bits < 32),
        tuple(s for s in sites.activations if recipe.for_layer(s.module).activation_bits < 32),
    )


def _check_overrides(recipe: Recipe, modules: list[str]) -> None:
    """An override that matches no layer is a typo, and would otherwise pass unseen."""
    for override in recipe.overrides:
        if not any(fnmatch.fnmatchcase(module, override.match) for module in modules):
            raise RecipeError(
                f"recipe key 'overrides': pattern {override.match!r} matches no layer; layers are called like "
                f"{next((m for m in modules if m), 'nothing here')!r}."
            )


def _check_weights(graph: fx.GraphModule, sites: Sites) -> None:
    nodes = {n.name: n for n in graph.graph.nodes}
    for site in sites.weights:
        found = weight_of(graph, nodes[site.node])
        if found is not None and not bool(torch.isfinite(found[0]).all()):
            raise ModelError(f"The weight of layer {site.module} holds values that are not finite; mend the weights.")


@dataclass(frozen=True)
class _Pictures:
    """The calibration pictures.

    Attributes:
        stream: call it for a fresh stream of batches (n, 3, H, W), the same ones each time.
        count: pictures in a stream, unreadable ones counted until they are met.
        source: where they are from, for people.
        dataset: None where they came as a tensor.
    """

    stream: Callable[[], Iterator[Tensor]]
    count: int
    source: str
    dataset: Dataset | None = None

    @property
    def read(self) -> int:
        """How many were readable; known once they have been streamed."""
        return self.count if self.dataset is None else min(self.count, len(self.dataset) - len(self.dataset.skipped))

    def notes(self) -> list[str]:
        """A sentence for the report if some could not be read."""
        if self.dataset is None or not self.dataset.skipped:
            return []
        skipped = self.dataset.skipped
        name, reason = next(iter(skipped.items()))
        return [f"{len(skipped)} calibration pictures of {self.source} were skipped; the first, {name}: {reason}"]


def _pictures(
    calib: str | Path | Dataset | Tensor | None, loaded: LoadedModel, recipe: Recipe, preprocessing: Preprocessing
) -> _Pictures:
    size, batch = recipe.calibration.size, recipe.calibration.batch
    if isinstance(calib, Tensor):
        images = _checked(calib, preprocessing)[:size].float()
        return _Pictures(lambda: iter(torch.split(images, batch)), len(images), "a tensor")
    dataset = default_data(loaded, "calibration") if calib is None else calib
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset, "calibration")
    chosen = dataset.shuffled(recipe.seed)

    def stream() -> Iterator[Tensor]:
        for item in chosen.batches(preprocessing, batch, size):
            yield item.images

    count = min(size, len(chosen))
    small = count * math.prod(preprocessing.input_size) * 4 <= KEPT_BYTES
    return _Pictures(_kept(stream) if small else stream, count, dataset.name, chosen)


def _kept(stream: Callable[[], Iterator[Tensor]]) -> Callable[[], Iterator[Tensor]]:
    """The same stream, read and decoded once; methods that walk over the pictures several times gain seconds."""
    batches: list[Tensor] = []

    def again() -> Iterator[Tensor]:
        if not batches:
            batches.extend(stream())
        return iter(batches)

    return again


def _checked(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """A tensor of pictures that the model can take, or a `DataError`: some nets fold a wrong size into the batch."""
    wanted = "×".join(map(str, preprocessing.input_size))
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != preprocessing.input_size:
        given = "×".join(map(str, images.shape))
        raise DataError(
            f"The calibration tensor is {given}, but must be pictures of {wanted}, preprocessed: n×{wanted}."
        )
    if not bool(torch.isfinite(images).all()):
        raise DataError("The calibration tensor holds values that are not finite; preprocess the pictures anew.")
    return images


def default_data(model: LoadedModel | QuantizedModel, part: Part) -> Dataset:
    """The built-in pictures that fit a model: flowers for the demo net, photos for all others."""
    name = model.name if isinstance(model, LoadedModel) else model.info["model"]
    return open_builtin("flowers" if name == DEMO else "photos", part)


def export(model: QuantizedModel, path: str | Path, *, target: str | None = None, quantized: bool = True) -> Path:
    """Write the deployable file of a quantized model, whole or not at all.

    Args:
        model: what `quantize` or `load` gave.
        path: file to write.
        target: default: the recipe's.
        quantized: False writes the float model, for comparison.

    Raises:
        TargetError: if the target exports nothing, an operator has no form in it, or the file cannot be written.
    """
    chosen = TARGETS[target or model.recipe.target]
    if chosen.export is None:
        raise TargetError(f"Target {chosen.name} exports nothing; choose another one with target=onnxruntime.")
    chosen.check(model.recipe, model.sites.modules())
    chosen.check_parameters(model)
    model = replace(model, recipe=chosen.prepare(model.recipe))  # it may have been made for another target
    path = Path(path).expanduser()
    if path.is_dir():
        raise TargetError(
            f"{path} is a folder; name a file to export to, such as {path / (chosen.file_name or 'model')}."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen.export(model, path, quantized)
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error.strerror or error}.") from None
    return path
