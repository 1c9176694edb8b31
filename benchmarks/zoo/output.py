"""What a training leaves behind: weights, and the card that says how to use them and how they came about."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from qhyvit import evaluate, load_model

ENOUGH = 0.35  # top-1 on Tiny-ImageNet-100 below which a net is no basis for a claim


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Write beside, then rename: a stopped run leaves the old file whole."""
    beside = path.with_suffix(path.suffix + ".part")
    save(beside)
    beside.replace(path)
    path.chmod(0o644)


def stored(state: dict[str, Tensor], half: bool) -> dict[str, Tensor]:
    """Weights as they are written: matrices and kernels as fp16; vectors stay, as a variance may leave fp16's range."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return {k: v.half() if half and v.is_floating_point() and v.ndim > 1 else v for k, v in tensors.items()}


def began_from(name: str, weights: Path) -> dict[str, Any]:
    """What the card of the weights that a training began from says; its minutes and pictures come on top."""
    path = weights.with_suffix(".json")
    card = json.loads(path.read_text()) if path.is_file() else {}
    keys = ("val_top1", "minutes", "pictures_seen", "recipe", "began_from")
    return {"weights": name, **{key: card[key] for key in keys if key in card}}


def write_card(weights: Path, recipe: dict[str, Any], size: int, told: dict[str, Any], val: Path) -> float:
    """Write the card beside `weights` and return its top-1: that of the weights as written, by qhyvit's own evaluation.

    Args:
        weights: .safetensors file.
        recipe: the training's recipe.
        size: side of the pictures that the net takes.
        told: what only the training knows.
        val: archive of labelled pictures.
    """
    card = {
        "model": recipe["model"],
        "library": f"timm {timm.__version__}",
        "create": {"model_name": recipe["model"], **recipe["model_args"]},
        "input": [3, size, size],
        **{key: recipe[key] for key in ("mean", "std", "crop_pct")},
        "interpolation": "bicubic",
        "data": recipe["train"],
        **told,
        "recipe": recipe,
    }
    path = weights.with_suffix(".json")
    write(path, lambda p: p.write_text(json.dumps(card, indent=1)))
    scores = evaluate(load_model(recipe["model"], weights=weights), val)["float"]
    assert scores is not None
    assert scores.top1 is not None
    card |= {"val_top1": round(scores.top1, 4), "basis_for_claims": scores.top1 >= ENOUGH}
    write(path, lambda p: p.write_text(json.dumps(card, indent=1)))
    return scores.top1
