"""torchvision's classifiers by name, with the preprocessing that belongs to their weights."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from qhyvit.errors import ModelError
from qhyvit.models.build import reason

_PREFIXES = ("torchvision/", "torchvision.models:")


def is_torchvision(name: str) -> bool:
    """Whether `name` is of the form "torchvision/resnet18" or "torchvision.models:resnet18"."""
    return name.startswith(_PREFIXES)


def build_torchvision(
    name: str, state: Mapping[str, Tensor] | None, pretrained: bool, num_classes: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The net, with random or torchvision's best weights, and its timm data config.

    Args:
        name: as `is_torchvision` takes it.
        state: weights that will be loaded; they say how many classes there are where `num_classes` does not.
        pretrained: download the weights.
        num_classes: default: 1000.

    Raises:
        ModelError: if torchvision has no such classifier, refuses the arguments, or could not fetch the weights.
    """
    short = next(name.removeprefix(p) for p in _PREFIXES if name.startswith(p))
    known = torchvision.models.list_models(module=torchvision.models)
    if short not in known:
        near = difflib.get_close_matches(short, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torchvision.models.list_models()."
        raise ModelError(f"torchvision has no classifier called {short!r}; {hint}")
    weights = torchvision.models.get_model_weights(short).DEFAULT
    if num_classes is None and state is not None:
        num_classes = _held(short, state)
    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        module: nn.Module = torchvision.models.get_model(short, weights=weights if pretrained else None, **arguments)
    except Exception as error:  # what is raised depends on the network and the net
        if pretrained:
            raise ModelError(
                f"{name} could not be fetched ({reason(error)}); "
                "fetch the file where there is a network and pass it with --weights."
            ) from error
        raise ModelError(f"torchvision cannot build {short} ({reason(error)}); check its arguments.") from error
    return module, _data_config(weights.transforms())


def _held(name: str, state: Mapping[str, Tensor]) -> int | None:
    """Classes in `state`, where its classifiers differ from the usual ones in nothing but their number."""
    with torch.device("meta"):
        usual = torchvision.models.get_model(name, weights=None).state_dict()
    other = {
        len(tensor)
        for key, tensor in state.items()
        if key in usual and tensor.ndim == usual[key].ndim > 0 and tensor.shape != usual[key].shape
    }
    return other.pop() if len(other) == 1 else None


def _data_config(transforms: Any) -> dict[str, Any]:
    side, resized = transforms.crop_size[0], transforms.resize_size[0]
    return {
        "input_size": (3, side, side),
        "crop_pct": side / resized,
        "interpolation": transforms.interpolation.value,
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
    }
