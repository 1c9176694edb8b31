"""A model by name, ready to be quantized: built, its weights loaded, its preprocessing known."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from qhyvit.errors import ModelError
from qhyvit.models.build import build_own, build_timm, classifiers, is_own, reason, seeded, timm_config
from qhyvit.models.card import Card, read_card
from qhyvit.models.cost import multiply_adds
from qhyvit.models.from_torchvision import build_torchvision, is_torchvision
from qhyvit.models.published import counts, published
from qhyvit.models.state import classifier_classes, load_state, read_state
from qhyvit.models.stress import Stress, default_images
from qhyvit.models.stress import stress as make_twin
from qhyvit.models.zoo import is_zoo, zoo_names, zoo_weights

DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).parent / "weights" / "demo_mobilevit_xxs.safetensors"
# The families on which the paper's method was published; every timm classifier can be loaded.
FAMILIES = ("mobilevit_*", "mobilevitv2_*", "efficientformer_*", "efficientformerv2_*", "mobile_former_*")


@dataclass
class LoadedModel:
    """A classifier and what is known about it.

    Args:
        name: as it was asked for; the class's name for a module.
        module: in eval mode, float32; takes (n, channels, height, width), gives logits (n, num_classes).
        preprocessing_config: timm data config: input_size, mean, std, interpolation, crop_pct, crop_mode.
        num_classes: number of logits.
        class_names: names by index, where a card gives them.
        source: where the weights came from, a phrase for people.
        trained: False where the weights are as initialised, so that accuracy means nothing.
    """

    name: str
    module: nn.Module
    preprocessing_config: dict[str, Any]
    num_classes: int
    class_names: tuple[str, ...] | None
    source: str
    trained: bool


def load_model(
    name: str | nn.Module,
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    input_size: int | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    stress: str | None = None,
) -> LoadedModel:
    """Build a model and load its weights.

    Args:
        name: "demo" (the net that ships with the package), "zoo/NAME" (see `zoo`), a timm name,
            "torchvision/resnet18", "pkg.mod:builder" (a function that returns an `nn.Module`; the current folder is
            importable), or a module, which is copied.
        weights: .safetensors, .pt, .pth or .bin file with a state dict. A JSON card beside it (`card.Card`) sets
            arguments of the net, preprocessing and class names.
        pretrained: take timm's or torchvision's published weights, or pass `pretrained=True` to the builder.
        input_size: side of the pictures in pixels; default: the card's, else timm's for the net, else 224.
        num_classes: default: what the weights hold, else timm's for the net.
        seed: of the random weights, where there are no others.
        stress: take a twin that is the same function in float but hard to quantize: "ranges:30", "shift", "both:30"
            (`qhyvit.models.stress`).

    Raises:
        CaptureError: if a twin is asked for and the model cannot be captured.
        ModelError: whatever hinders the model from being built, loaded, or run on one picture.
    """
    asked = Stress.parse(stress) if stress is not None else None
    path = Path(weights).expanduser() if weights is not None else None
    _check_options(name, path, pretrained, input_size, num_classes)
    if name == DEMO:
        path = DEMO_WEIGHTS
    elif is_zoo(name):
        path = zoo_weights(str(name))
    card, state = (read_card(path), read_state(path)) if path else (Card(), None)
    known: dict[str, Any] = {}
    with seeded(seed):
        if isinstance(name, nn.Module):
            module = _copied(name)
        elif is_torchvision(name):
            module, known = build_torchvision(name, state, pretrained, num_classes or card.num_classes)
        elif is_own(name):
            module = build_own(name, pretrained, num_classes or card.num_classes, seed)
        else:
            timm_name = card.create["model_name"] if name == DEMO or is_zoo(name) else name
            module = _timm(timm_name, card, state, path, pretrained, input_size, num_classes)
    if state is not None and path is not None:
        load_state(module, state, path)
    module = module.float().eval()
    config = timm.data.resolve_model_data_config(module, args=known | card.data_config)
    if input_size is not None:
        config["input_size"] = (config["input_size"][0], input_size, input_size)
    label = name if isinstance(name, str) else type(name).__name__
    classes = _count_classes(module, config["input_size"], label)
    if num_classes not in (None, classes):
        raise ModelError(f"{label} has {classes} classes, not {num_classes}; leave the number of classes out.")
    if card.classes and len(card.classes) != classes:
        raise ModelError(
            f"The card of {path} names {len(card.classes)} classes, but {label} has {classes}; mend the card."
        )
    source, trained = _source(name, path, card, pretrained, seed)
    loaded = LoadedModel(label, module, config, classes, card.classes, source, trained)
    return loaded if asked is None else stressed(loaded, asked)


def stressed(model: LoadedModel, asked: Stress | str) -> LoadedModel:
    """The twin of a model under stress; its module is a captured graph, its source says so.

    Raises:
        CaptureError: if the model cannot be captured.
        ModelError: if `asked` cannot be read, or nothing in the model can be stressed so.
    """
    asked = Stress.parse(asked) if isinstance(asked, str) else asked
    images = default_images(model.preprocessing_config)
    twin = make_twin(model.module, asked.kind, asked.amount, seed=asked.seed, images=images)
    return replace(model, module=twin, source=f"{model.source}, stressed with {asked}")


def list_models() -> list[dict[str, Any]]:
    """The demo net, the zoo and the nets of the paper's families. Nothing is downloaded and no weights are made.

    Each has `name`, `parameters` and `macs` (multiply-adds for one picture; both in millions), `input_size` (C, H, W)
    and `published` (`published.published`: top-1 as reported, float and quantized by Q-HyViT).
    """
    rows = []
    for name, weights in {DEMO: DEMO_WEIGHTS, **{name: zoo_weights(name) for name in zoo_names()}}.items():
        card = read_card(weights)
        if card.architecture and card.input:
            arguments = {key: value for key, value in card.create.items() if key != "model_name"}
            rows.append(_row(name, card.input, card.architecture, **arguments))
    for name in timm.list_models(list(FAMILIES)):
        rows.append(_row(name, timm.get_pretrained_cfg(name).input_size))
    return rows


def _row(name: str, size: tuple[int, int, int], architecture: str = "", **arguments: Any) -> dict[str, Any]:
    counted = counts(name)
    if counted is None:  # newer than the file
        module = _on_meta(architecture or name, **arguments)
        counted = sum(p.numel() for p in module.parameters()), multiply_adds(module, size)
    return {
        "name": name,
        "parameters": counted[0] / 1e6,
        "macs": counted[1] / 1e6,
        "input_size": tuple(size),
        "published": published(name),
    }


def _on_meta(name: str, **arguments: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def _check_options(
    name: str | nn.Module, path: Path | None, pretrained: bool, input_size: int | None, num_classes: int | None
) -> None:
    for what, number in (("input size", input_size), ("number of classes", num_classes)):
        if number is not None and number < 1:
            raise ModelError(f"The {what} must be at least 1, not {number}.")
    if path and pretrained:
        raise ModelError(f"Weights come either from {path} or pretrained from the hub; give one of the two.")
    if path and name == DEMO:
        raise ModelError("The demo model has its own weights; to load others name the net, mobilevit_xxs.")
    if name == DEMO and not DEMO_WEIGHTS.is_file():
        raise ModelError(f"The demo model's weights {DEMO_WEIGHTS} are missing; install qhyvit again.")
    if is_zoo(name) and (path or pretrained):
        raise ModelError(f"{name} has its own weights; to load others name the net that its card gives.")
    if isinstance(name, nn.Module) and pretrained:
        raise ModelError("A module given in memory has no pretrained weights to fetch; load them into it before.")


def _timm(
    name: str,
    card: Card,
    state: dict[str, Tensor] | None,
    path: Path | None,
    pretrained: bool,
    input_size: int | None,
    num_classes: int | None,
) -> nn.Module:
    config = timm_config(name)
    if card.architecture and config and card.architecture != name.split(".")[0]:
        raise ModelError(f"{path} holds weights of {card.architecture}, not of {name}; name that net.")
    held = classifier_classes(state, classifiers(config)) if state else None
    if pretrained and config:
        held = config["num_classes"]
    if held and num_classes not in (None, held):
        raise ModelError(
            f"The weights of {name} have {held} classes, not {num_classes}; leave the number of classes out."
        )
    arguments = dict(card.create, num_classes=num_classes or card.num_classes or held)
    arguments.pop("model_name", None)
    size = input_size or (card.input[-1] if card.input else None)
    # Nets with tables by position are built for one size; a card's own img_size stands, but not against the caller.
    if size and config.get("fixed_input_size") and (input_size or "img_size" not in arguments):
        arguments["img_size"] = size
    return build_timm(name, config, pretrained, **arguments)


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # tensors with a history, locks, open files …
        raise ModelError(f"{type(module).__name__} cannot be copied ({reason(error)}); give a fresh module.") from error


def _count_classes(module: nn.Module, input_size: tuple[int, int, int], label: str) -> int:
    """Run one black picture through a copy (nets cache tables on the first run) and count the logits."""
    shape = "×".join(str(side) for side in input_size)
    parameter = next(module.parameters(), None)
    picture = torch.zeros(1, *input_size, device=parameter.device if parameter is not None else None)
    try:
        with torch.no_grad():
            logits = _copied(module)(picture)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{label} cannot take a {shape} picture ({reason(error)}); set the input size.") from error
    if not isinstance(logits, Tensor) or logits.shape[:1] != (1,) or logits.ndim != 2 or not logits.shape[1]:
        said = f"a tensor of shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(f"{label} gives {said} for one {shape} picture; only classifiers (1, classes) are supported.")
    if getattr(module, "num_classes", None) == 0:
        raise ModelError(f"{label} has no classifier and gives features; set the number of classes.")
    return logits.shape[1]


def _source(name: str | nn.Module, path: Path | None, card: Card, pretrained: bool, seed: int) -> tuple[str, bool]:
    """Where the weights came from, and whether they count as trained."""
    score = f"top-1 {card.val_top1:.1%}" + (f" on {card.val}" if card.val else "") if card.val_top1 is not None else ""
    if name == DEMO:
        return "weights that ship with qhyvit (" + ", ".join(s for s in (card.architecture, score) if s) + ")", True
    if is_zoo(name):
        hint = "no basis for a claim" if card.basis_for_claims is False else ""
        return f"zoo weights ({', '.join(s for s in (card.architecture, score, hint) if s)})", True
    if path:
        return f"weights from {path}" + (f" ({score})" if score else ""), True
    if isinstance(name, nn.Module):
        return f"a module given in memory ({type(name).__name__})", True
    if pretrained:
        return f"pretrained weights of {name}", True
    if is_own(name):
        return f"weights as {name} made them (seed {seed})", False
    return f"random weights (seed {seed})", False
