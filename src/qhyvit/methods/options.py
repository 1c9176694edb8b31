"""A method's own options: the recipe's mapping `options` read into the method's dataclass."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from qhyvit.errors import RecipeError

T = TypeVar("T")


def read_options(kind: type[T], method: str, given: dict[str, Any]) -> T:
    """Options from a recipe.

    Args:
        kind: a dataclass whose fields all have defaults; their annotations (also pydantic's) say what is allowed.
        method: for messages.
        given: the recipe's `options`.

    Raises:
        RecipeError: on an unknown key or a value that is not allowed; names the key and what is.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known) or 'none'}."
        raise RecipeError(f"recipe key 'options.{key}' is not one of method {method}; {hint}")
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        raise RecipeError(f"recipe key 'options.{key}': {said}, got {first['input']!r}.") from None
