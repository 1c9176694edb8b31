"""A quantized model as a folder, written whole or not at all, and read without running code.

    recipe.yaml             how it was made
    info.json               model, sites, quantizers, format version, checksums of the other files
    graph.json              the float graph's operators
    float.safetensors       its constants
    quantized.safetensors   integer weights, scales, zero points, corrected biases
    metrics.json            what was measured, if anything was
    model.onnx              the target's own file, if the target has one

The same model gives the same bytes: nothing in it depends on the time, the machine's name or the folder's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qhyvit import __version__
from qhyvit._tensors import pack, unpack
from qhyvit.errors import ModelError, QhyvitError
from qhyvit.graph.serialise import from_json, to_json
from qhyvit.graph.sites import ActivationSite, Sites, WeightSite
from qhyvit.operators import OPERATORS
from qhyvit.quantized import Parameters, QuantizedModel
from qhyvit.quantizers import QUANTIZERS
from qhyvit.recipe import Recipe
from qhyvit.registry import Registry
from qhyvit.stored import Stored
from qhyvit.targets import TARGETS

RECIPE, INFO, GRAPH, METRICS = "recipe.yaml", "info.json", "graph.json", "metrics.json"
FLOAT, QUANTIZED = "float.safetensors", "quantized.safetensors"
FORMAT, VERSION = "qhyvit", 1


def save(
    model: QuantizedModel, folder: str | Path, *, metrics: dict[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write a model and, where its target exports, the target's file.

    Args:
        model: what to write.
        folder: made with its parents; appears only once it is complete.
        metrics: JSON-able results to keep with the model.
        overwrite: replace a folder that holds another quantized model, with all that lies in it.

    Returns:
        The folder.

    Raises:
        ModelError: if the folder exists and may not be replaced, or cannot be written.
        TargetError: if the target cannot express the model.
    """
    check_writable(folder, overwrite=overwrite)
    place = Path(folder).expanduser().resolve()
    unique = uuid.uuid4().hex[:8]
    beside, old = (place.with_name(f".{place.name}.{unique}.{kind}") for kind in ("part", "old"))
    try:
        beside.mkdir(parents=True)
        _write(model, beside, metrics)
        _swap(beside, place, old)
    except OSError as error:
        raise ModelError(f"Folder {folder} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Path(folder)


def write_metrics(folder: str | Path, metrics: dict[str, Any]) -> None:
    """Keep results, JSON-able, with a saved model; they replace earlier ones.

    Raises:
        ModelError: if the folder cannot be written.
    """
    path = Path(folder).expanduser() / METRICS
    beside = path.with_name(f".{METRICS}.part")
    try:
        _write_json(beside, metrics)
        beside.replace(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}.") from None


def check_writable(folder: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that `save` would refuse, before long work is done for it.

    Raises:
        ModelError: if something lies there that is no quantized model, or is one and `overwrite` is false.
    """
    place = Path(folder).expanduser()
    try:
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return
    except OSError as error:
        raise ModelError(f"Folder {folder} cannot be read: {error.strerror or error}.") from None
    if not place.is_dir():
        raise ModelError(f"{folder} is a file; name a folder for the quantized model.")
    if not _is_ours(place):
        raise ModelError(f"Folder {folder} holds other things than a quantized model; name another folder.")
    if not overwrite:
        raise ModelError(
            f"Folder {folder} already holds a quantized model; name another, or pass --force (overwrite=True)."
        )


def load(folder: str | Path) -> QuantizedModel:
    """Read a model; it computes the same numbers, and exports the same bytes, as the one that was saved.

    Raises:
        ModelError: naming the file that is missing, damaged or of another version.
        RecipeError: if the recipe does not validate.
    """
    place = Path(folder).expanduser()
    info = _read_info(place, folder)
    files = {name: _read(place, name, info) for name in (RECIPE, GRAPH, FLOAT, QUANTIZED)}
    recipe = Recipe.from_yaml(place / RECIPE)
    name = FLOAT
    try:
        constants = unpack(files[FLOAT], info["strides"][FLOAT])
        name = QUANTIZED
        tensors = unpack(files[QUANTIZED], info["strides"][QUANTIZED])
        name = GRAPH
        graph = from_json(json.loads(files[GRAPH]), constants)
        name = INFO
        sites = Sites(
            tuple(WeightSite(**_tuples(site)) for site in info["sites"]["weights"]),
            tuple(ActivationSite(**_tuples(site)) for site in info["sites"]["activations"]),
        )
        parameters = _parameters(info, tensors)
        model = QuantizedModel(graph, sites, parameters, recipe, info["model"], info["integer_bias"])
        _check_fit(model)
    except (QhyvitError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        said = str(error).rstrip(".") or type(error).__name__
        raise ModelError(f"{place / name} is damaged, or not made for the files beside it: {said}.") from None
    return model


def exported_path(folder: str | Path) -> Path | None:
    """The target's file in a saved model's folder, None where there is none."""
    place = Path(folder).expanduser()
    name = TARGETS[Recipe.from_yaml(place / RECIPE).target].file_name
    return place / name if name and (place / name).is_file() else None


# Writing ----------------------------------------------------------------------------------------------------------


def _write(model: QuantizedModel, folder: Path, metrics: dict[str, Any] | None) -> None:
    target, parameters = TARGETS[model.recipe.target], model.parameters
    tensors: dict[str, Tensor] = {f"biases.{node}": bias for node, bias in parameters.biases.items()}
    for node, quantizer in parameters.weights.items():
        tensors[f"weights.{node}.codes"] = model.codes(node).to(_code_dtype(quantizer))
    modules = _modules(parameters)
    for kind, held in modules.items():
        for name, module in held.items():
            tensors |= {f"{kind}.{name}.{key}": value for key, value in module.state_dict().items()}
    strides = {}
    for name, packed in ((FLOAT, dict(model.graph.named_buffers(recurse=False))), (QUANTIZED, tensors)):
        data, strides[name] = pack(packed)
        (folder / name).write_bytes(data)
    (folder / RECIPE).write_text(model.recipe.to_yaml(), encoding="utf-8", newline="\n")
    _write_json(folder / GRAPH, to_json(model.graph), indent=None)
    info = {
        "format": FORMAT,
        "version": VERSION,
        "qhyvit": __version__,
        "model": model.info,
        "sites": asdict(model.sites),
        "quantizers": {kind: {name: m.spec() for name, m in held.items()} for kind, held in modules.items()},
        "biases": sorted(parameters.biases),
        "notes": parameters.notes,
        "integer_bias": model.integer_bias,
        "strides": strides,
        "sha256": {name: _digest((folder / name).read_bytes()) for name in (RECIPE, GRAPH, FLOAT, QUANTIZED)},
    }
    _write_json(folder / INFO, info)
    if metrics is not None:
        write_metrics(folder, metrics)
    if target.export is not None and target.file_name is not None:
        target.export(model, folder / target.file_name, True)


def _modules(parameters: Parameters) -> dict[str, Mapping[str, Stored]]:
    """What is kept by its specification and its tensors."""
    return {
        "weights": parameters.weights,
        "activations": parameters.activations,
        "operators": parameters.operators,
    }


def _swap(beside: Path, place: Path, old: Path) -> None:
    """Put a finished folder in its place; whatever interrupts, the place holds the old or the new one."""
    try:
        if place.exists():
            place.rename(old)
        beside.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    finally:
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)


def _code_dtype(quantizer: Any) -> torch.dtype:
    wide = quantizer.bits > 8
    if quantizer.signed:
        return torch.int16 if wide else torch.int8
    return torch.uint16 if wide else torch.uint8


def _write_json(path: Path, data: Any, indent: int | None = 1) -> None:
    text = json.dumps(data, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Reading ----------------------------------------------------------------------------------------------------------


def _is_ours(folder: Path) -> bool:
    try:
        info = json.loads((folder / INFO).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(info, dict) and info.get("format") == FORMAT


def _read_info(place: Path, folder: str | Path) -> dict[str, Any]:
    if not place.is_dir():
        raise ModelError(f"There is no folder {folder}; give one that holds a quantized model.")
    if not (place / INFO).is_file():
        raise ModelError(f"{place / INFO} is missing, so {folder} holds no quantized model.")
    try:
        info = json.loads((place / INFO).read_bytes())
        if info["format"] != FORMAT:
            raise ModelError(f"{place / INFO} was not written by qhyvit, so {folder} holds no quantized model.")
        if info["version"] != VERSION:
            raise ModelError(
                f"{place / INFO} is of format version {info['version']}, this qhyvit reads version {VERSION}; "
                f"use qhyvit {info['qhyvit']}, which wrote it, or quantize again."
            )
        for name in (RECIPE, GRAPH, FLOAT, QUANTIZED):
            str(info["sha256"][name])
        return {**info, "strides": {name: dict(info["strides"][name]) for name in (FLOAT, QUANTIZED)}}
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        raise ModelError(f"{place / INFO} is damaged; quantize again.") from None


def _read(place: Path, name: str, info: Mapping[str, Any]) -> bytes:
    try:
        data = (place / name).read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        said = "is missing" if missing else f"cannot be read ({error.strerror})"
        raise ModelError(f"{place / name} {said}; save the model again.") from None
    if _digest(data) != info["sha256"][name]:
        raise ModelError(f"{place / name} is damaged or was edited: it is not what was saved; quantize again.")
    return data


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def _parameters(info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Parameters:
    specs, held = info["quantizers"], dict[str, dict[str, Any]]()
    registry: Registry[Any]
    for kind, registry in (("weights", QUANTIZERS), ("activations", QUANTIZERS), ("operators", OPERATORS)):
        held[kind] = {}
        for name, spec in specs.get(kind, {}).items():
            prefix = f"{kind}.{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            own.pop("codes", None)
            held[kind][name] = registry[spec["kind"]].from_spec(spec, **own)
    return Parameters(
        activations=held["activations"],
        weights=held["weights"],
        codes={name: tensors[f"weights.{name}.codes"].to(torch.int32) for name in specs["weights"]},
        biases={name: tensors[f"biases.{name}"] for name in info["biases"]},
        notes=list(info["notes"]),
        operators=held["operators"],
    )


def _check_fit(model: QuantizedModel) -> None:
    """ValueError where sites, quantizers and graph are not of one model."""
    for site in model.sites.weights:
        model.nodes[site.node]
        if model.parameters.weights[site.node] and model.codes(site.node).shape != site.shape:
            raise ValueError(f"weight {site.node} has another shape")
    for activation in model.sites.activations:
        for name in (activation.value, *activation.readers):
            model.nodes[name]
        model.parameters.activations[activation.value]
    for node in model.parameters.operators:
        model.nodes[node]
