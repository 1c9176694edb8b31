"""Weights files: reading them without running code, and putting them into a module."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qhyvit.errors import ModelError

_PICKLED = (".pt", ".pth", ".bin")
# Averaged weights first: they are the ones that were evaluated.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a weights file by name, on the CPU.

    A state dict may lie under `state_dict_ema`, `model_ema`, `state_dict` or `model` (in this order), and its names may
    begin with `module.` or `_orig_mod.`, which are removed. Pickled files may end in .tar besides (`.pth.tar`), and may
    hold the training script's `argparse.Namespace`, which is inert; no other Python objects.

    Raises:
        ModelError: if the file is missing, damaged, of another kind, or holds Python objects.
    """
    if not path.is_file():
        raise ModelError(f"Weights {path} do not exist; check the path.")
    if path.suffix == ".safetensors":
        try:
            return _unwrapped(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"Weights {path} cannot be read ({error}); write the file again.") from None
    if Path(path.name.removesuffix(".tar")).suffix not in _PICKLED:
        raise ModelError(
            f"Weights {path} are of an unknown kind; give a file ending in .safetensors, .pt, .pth or .bin."
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = _find_state(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"Weights {path} are damaged or hold Python objects, which are refused because loading them can run code; "
            "save only model.state_dict(), best as .safetensors."
        ) from None
    if state is None:
        raise ModelError(f"Weights {path} hold no state dict; save model.state_dict().")
    return _unwrapped(state)


def classifier_classes(state: Mapping[str, Tensor], classifiers: Sequence[str]) -> int | None:
    """Number of classes, read off the last weight (of two or more dimensions) that lies in one of `classifiers`."""
    prefixes = tuple(f"{name}." for name in classifiers)
    found = [t for key, t in state.items() if key.startswith(prefixes) and key.endswith("weight") and t.ndim >= 2]
    return len(found[-1]) if found else None


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy `state` into `module`, all names and shapes equal; only BatchNorm's batch counters may be missing.

    Raises:
        ModelError: naming up to three weights that are missing, unexpected, of another shape, or hold NaN.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and tensor.isnan().any()]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "NaN in": broken}
    if said := [f"{kind}: {_first(keys)}" for kind, keys in problems.items() if keys]:
        raise ModelError(
            f"Weights {path} do not fit the model ({'; '.join(said)}); give the net they were trained for."
        )
    module.load_state_dict(dict(state), strict=False)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _find_state(loaded: Any) -> dict[str, Tensor] | None:
    """The first state dict in `loaded`; entries that are no tensors are left out."""
    if not isinstance(loaded, dict):
        return None
    for name in _CONTAINERS:
        if isinstance(loaded.get(name), dict) and (state := _find_state(loaded[name])):
            return state
    state = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return state or None


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if state and all(key.startswith(wrapper) for key in state):
            return _unwrapped({key.removeprefix(wrapper): value for key, value in state.items()})
    return state
