"""The main verb: a model and pictures in, a quantized model out."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qhyvit.calibration.bias import correct_biases
from qhyvit.data.dataset import Dataset, Part, open_builtin, open_dataset
from qhyvit.data.preprocessing import Preprocessing
from qhyvit.errors import RecipeError, TargetError
from qhyvit.graph.capture import capture
from qhyvit.graph.sites import place
from qhyvit.methods import METHODS, Problem
from qhyvit.models.load import DEMO, LoadedModel, load_model
from qhyvit.quantized import QuantizedModel
from qhyvit.recipe import Recipe
from qhyvit.targets import TARGETS


def quantize(
    model: str | nn.Module | LoadedModel = DEMO,
    *,
    calib: str | Path | Dataset | Tensor | None = None,
    recipe: Recipe | str | Path | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    input_size: int | None = None,
    **changes: Any,
) -> QuantizedModel:
    """Quantize an image classifier after training.

    Args:
        model: "demo", a timm name, "package.module:builder", a module, or what `load_model` gave.
        calib: calibration pictures: a folder, zip, npz, built-in name ("flowers", "photos"), a `Dataset`, or a batch of
            preprocessed pictures (n, 3, H, W). Default: the built-in set that fits the model.
        recipe: a `Recipe`, or a YAML file; default: W8A8, method mse, target onnxruntime.
        weights: safetensors or state-dict file (the recipe's section `weights` is changed through `recipe`).
        pretrained: take timm's published weights.
        input_size: side of the pictures.
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
    if isinstance(model, LoadedModel):
        loaded = model
    else:
        loaded = load_model(model, weights=weights, pretrained=pretrained, input_size=input_size, seed=recipe.seed)
    preprocessing = Preprocessing.from_config(loaded.preprocessing_config)

    torch.manual_seed(recipe.seed)
    graph = capture(loaded.module, torch.zeros(1, *preprocessing.input_size))
    sites = place(
        graph,
        scope=recipe.scope,
        is_float=lambda module: min(_bits(recipe, module)) >= 32,
        quantized_outputs=target.quantized_outputs,
    )
    target.check(recipe, sites.modules())
    _check_overrides(recipe, [str(n.meta.get("module", "")) for n in graph.graph.nodes])
    stream, count, source = _pictures(
        recipe.calibration.source if calib is None else calib, loaded, recipe, preprocessing
    )
    problem = Problem(graph, sites, recipe, stream, count)
    parameters = method(problem)
    info = {
        "model": loaded.name,
        "source": loaded.source,
        "trained": loaded.trained,
        "num_classes": loaded.num_classes,
        "class_names": list(loaded.class_names) if loaded.class_names else None,
        "preprocessing": preprocessing.to_dict(),
        "calibration": {"source": source, "pictures": count},
    }
    quantized = QuantizedModel(graph, sites, parameters, recipe, info, target.integer_bias)
    if recipe.bias_correction:
        correct_biases(quantized, stream(), count)
    return quantized


def _bits(recipe: Recipe, module: str) -> tuple[int, int]:
    layer = recipe.for_layer(module)
    return layer.weight_bits, layer.activation_bits


def _check_overrides(recipe: Recipe, modules: list[str]) -> None:
    """An override that matches no layer is a typo, and would otherwise pass unseen."""
    for override in recipe.overrides:
        if not any(fnmatch.fnmatchcase(module, override.match) for module in modules):
            raise RecipeError(
                f"recipe key 'overrides': pattern {override.match!r} matches no layer; layers are called like "
                f"{next((m for m in modules if m), 'nothing here')!r}."
            )


def _pictures(
    calib: str | Path | Dataset | Tensor | None, loaded: LoadedModel, recipe: Recipe, preprocessing: Preprocessing
) -> tuple[Any, int, str]:
    """A function that streams the calibration batches, how many pictures it streams, and their source for people."""
    size, batch = recipe.calibration.size, recipe.calibration.batch
    if isinstance(calib, Tensor):
        images = calib[:size].float()
        return lambda: iter(torch.split(images, batch)), len(images), "a tensor"
    dataset = default_data(loaded, "calibration") if calib is None else calib
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(dataset, "calibration")
    chosen = dataset.shuffled(recipe.seed)

    def stream() -> Iterator[Tensor]:
        for item in chosen.batches(preprocessing, batch, size):
            yield item.images

    return stream, min(size, len(chosen)), dataset.name


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
        TargetError: if the target exports nothing, or an operator has no form in it.
    """
    chosen = TARGETS[target or model.recipe.target]
    if chosen.export is None:
        raise TargetError(f"Target {chosen.name} exports nothing; choose another one with target=onnxruntime.")
    chosen.check(model.recipe, model.sites.modules())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen.export(model, path, quantized)
    return path
