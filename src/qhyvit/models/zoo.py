"""Small trained nets that ship with the package, by name: `zoo/NAME`."""

from __future__ import annotations

import difflib
from pathlib import Path

from qhyvit.errors import ModelError

PREFIX = "zoo/"
FOLDER = Path(__file__).parent / "weights" / "zoo"


def is_zoo(name: object) -> bool:
    """Whether `name` asks for a net of the zoo."""
    return isinstance(name, str) and name.startswith(PREFIX)


def zoo_names() -> list[str]:
    """Names of the nets that are there, as `load_model` takes them, sorted."""
    return sorted(PREFIX + path.stem for path in FOLDER.glob("*.safetensors"))


def zoo_weights(name: str) -> Path:
    """Weights file of a net of the zoo; its card lies beside it.

    Raises:
        ModelError: if the zoo has no net of this name; names those that it has.
    """
    names = zoo_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ModelError(f"The zoo has no net called {name!r}; {hint}it has {', '.join(names) or 'none'}.")
    return FOLDER / f"{name.removeprefix(PREFIX)}.safetensors"
