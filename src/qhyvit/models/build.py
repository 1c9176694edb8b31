"""Building a module: a timm net by name, or what the user's own function returns."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import qhyvit.models.mobile_former  # noqa: F401  registers its nets with timm
from qhyvit.errors import ModelError

_HUB = ("hf-hub:", "hf_hub:", "local-dir:")


def is_own(name: str) -> bool:
    """Whether `name` is of the form "pkg.mod:builder" (timm's own prefixes also have a colon)."""
    return ":" in name and not name.startswith(_HUB)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's CPU generator under `seed`; the caller's random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def timm_config(name: str) -> dict[str, Any]:
    """timm's pretrained config of a net; empty for a name that lies on the hub or in a folder.

    Raises:
        ModelError: if timm has no such net or tag; names near ones.
    """
    if name.startswith(_HUB):
        return {}
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        if name in torchvision.models.list_models(module=torchvision.models):
            raise ModelError(f"timm has no model called {name!r}; did you mean torchvision/{name}?")
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models(), or give pkg.module:builder."
        raise ModelError(f"timm has no model called {name!r}; {hint}")
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise ModelError(f"timm has no pretrained tag {name!r}; known: {known}.") from None
    return dict(config.to_dict(), has_weights=bool(config.has_weights)) if config else {}


def classifiers(config: dict[str, Any]) -> tuple[str, ...]:
    """Module names of a timm net's classifiers; distilled nets have two."""
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def build_timm(name: str, config: dict[str, Any], pretrained: bool, **arguments: Any) -> nn.Module:
    """Build a timm net; `arguments` are those of `timm.create_model`, None is left out.

    Raises:
        ModelError: if timm refuses the arguments, has no weights, or could not fetch them.
    """
    if pretrained and config and not config.get("has_weights"):
        raise ModelError(f"timm has no pretrained weights for {name}; pass --weights.")
    remote = pretrained or name.startswith(_HUB)
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # what is raised depends on the download library, its version and the net
        if remote:
            raise ModelError(
                f"{name} could not be fetched from the hub ({reason(error)}); "
                "fetch the file where there is a network and pass it with --weights."
            ) from error
        raise ModelError(f"timm cannot build {name} ({reason(error)}); check its arguments.") from error
    return module


def build_own(path: str, pretrained: bool, num_classes: int | None, seed: int) -> nn.Module:
    """Import "pkg.mod:builder", with the current folder importable, and call it.

    The builder gets `num_classes` and `pretrained` where they are given and it takes them. It may also be a module
    itself, which is copied.

    Raises:
        ModelError: if there is no such module or function, it fails, or it returns no `nn.Module`.
    """
    module_name, _, function_name = path.partition(":")
    with _current_folder_importable():
        builder = _import(path, module_name, function_name)
        if isinstance(builder, nn.Module):
            return copy.deepcopy(builder)
        if not callable(builder):
            raise ModelError(f"{path} is a {type(builder).__name__}, not a function that returns an nn.Module.")
        arguments = _arguments(path, builder, pretrained, num_classes)
        try:
            with seeded(seed):  # here, as importing may draw too, but only the first time
                module = builder(**arguments)
        except Exception as error:
            raise ModelError(f"{path} failed ({reason(error)}); it must build the net without arguments.") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{path} returned a {type(module).__name__}; it must return an nn.Module.")
    return module


def _import(path: str, module_name: str, function_name: str) -> Any:
    if not function_name or not all(part.isidentifier() for part in module_name.split(".")):
        raise ModelError(f"Model {path!r} must be of the form pkg.module:builder.")
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(
                f"There is no module {module_name!r} for the model {path!r}; run where it can be imported."
            ) from None
        raise ModelError(
            f"Module {module_name!r} of the model {path!r} cannot be imported ({reason(error)})."
        ) from error
    if not hasattr(module, function_name):
        near = difflib.get_close_matches(function_name, [n for n in vars(module) if not n.startswith("__")], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "check the name after the colon."
        raise ModelError(f"Module {module_name!r} has no function {function_name!r}; {hint}")
    return getattr(module, function_name)


def _arguments(path: str, builder: Any, pretrained: bool, num_classes: int | None) -> dict[str, Any]:
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(builder).parameters
    except (TypeError, ValueError):  # built-in callables have none
        parameters = {}
    if pretrained and "pretrained" not in parameters:
        raise ModelError(f"{path} takes no argument 'pretrained'; pass --weights, or load the weights in the function.")
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments: dict[str, Any] = {"pretrained": True} if pretrained else {}
    if num_classes is not None and ("num_classes" in parameters or takes_all):
        arguments["num_classes"] = num_classes
    return arguments


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def reason(error: Exception) -> str:
    """Kind and first line of someone else's error, to stand in a sentence."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
