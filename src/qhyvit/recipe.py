"""What to do, as data: bits, method, scope, target, seed and all else that a result depends on.

A recipe is validated on every way in (constructor, YAML, `Recipe.updated`), and written beside each result so that the
result can be made again.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from qhyvit import _yaml
from qhyvit.errors import RecipeError

Granularity = Literal["per-channel", "per-tensor"]
Scheme = Literal["symmetric", "asymmetric"]

_BITS = re.compile(r"w([2-8]|16|32)a([2-8]|16|32)")
_BITS_HELP = "must be like 'w8a8', with widths 2 to 8, 16 or 32 (float)"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Granular(_Section):
    """How finely and in which scheme one kind of tensor (weights or activations) is quantized."""

    granularity: Granularity
    scheme: Scheme


class GranularChange(_Section):
    """The part of `Granular` that an override changes; None keeps what was there."""

    granularity: Granularity | None = None
    scheme: Scheme | None = None


class Ranges(_Section):
    """How ranges are found: `percentile` in percent, `zero` as in `quantizers.uniform_from_range`."""

    percentile: float = Field(default=99.99, gt=50, le=100)
    zero: Literal["extend", "clamp"] = "extend"


class Calibration(_Section):
    """Calibration pictures: how many, how many at a time, and from where (a folder, archive or data set name)."""

    size: int = Field(default=128, ge=1)
    batch: int = Field(default=4, ge=1)  # small batches stay in the processor's cache
    source: str | None = None


class Override(_Section):
    """A change for the layers whose dotted module name matches the shell pattern `match`.

    `bits` is as in `Recipe`, or "float" to leave the layer unquantized; None keeps the recipe's.
    """

    match: str = Field(min_length=1)
    bits: str | None = None
    weights: GranularChange | None = None
    activations: GranularChange | None = None

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, value: str | None) -> str | None:
        if value is None or value == "float" or _BITS.fullmatch(value):
            return value
        raise ValueError(f"{_BITS_HELP}, or 'float'")


@dataclass(frozen=True)
class LayerBits:
    """What the recipe asks of one layer, overrides applied. 32 bits mean float."""

    weight_bits: int
    activation_bits: int
    weights: Granular
    activations: Granular


class Recipe(_Section):
    """All that decides a result, but the model and the pictures.

    Methods and targets are only checked where they are used: they import this module. `saturation` is for x86
    processors without VNNI, where sums of u8×s8 products saturate at 16 bits: "unsigned" stores weights as uint8 (exact
    everywhere, slower), "reduce-range" takes one bit from 8-bit weights, "ignore" exports plain int8 weights, and
    "auto" asks the processor at hand.

    Raises:
        RecipeError: on an unknown key or a value out of range; names the key and what is allowed.
    """

    bits: str = "w8a8"
    method: str = Field(default="qhyvit", min_length=1)
    scope: Literal["partial", "full"] = "partial"
    target: str = Field(default="onnxruntime", min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    ranges: Ranges = Ranges()
    weights: Granular = Granular(granularity="per-channel", scheme="symmetric")
    activations: Granular = Granular(granularity="per-tensor", scheme="asymmetric")
    bias_correction: bool = False
    saturation: Literal["auto", "ignore", "reduce-range", "unsigned"] = "auto"
    options: dict[str, Any] = {}
    calibration: Calibration = Calibration()
    overrides: list[Override] = []

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        try:
            return handler(data)
        except ValidationError as error:
            sentence = "; ".join(_sentence(e) for e in error.errors()[:3])
            raise RecipeError(sentence if sentence.endswith("?") else sentence + ".") from None

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, value: str) -> str:
        if not _BITS.fullmatch(value):
            raise ValueError(_BITS_HELP)
        return value

    @field_validator("weights", "activations", mode="before")
    @classmethod
    def _complete(cls, value: Any, info: ValidationInfo) -> Any:
        # The two sections have different defaults: what a section leaves out is taken from its own.
        if not isinstance(value, Mapping):
            return value
        return {**cls.model_fields[str(info.field_name)].default.model_dump(), **value}

    @field_validator("options", mode="before")
    @classmethod
    def _plain_options(cls, value: Any) -> Any:
        return _plain(value, "options")

    @property
    def weight_bits(self) -> int:
        """Bits of weights, 32 for float."""
        return _split(self.bits)[0]

    @property
    def activation_bits(self) -> int:
        """Bits of activations, 32 for float."""
        return _split(self.bits)[1]

    def for_layer(self, module_name: str) -> LayerBits:
        """What holds for the layer of this dotted module name.

        Overrides are applied in their order, each changing only the keys it names, so the last match wins key by key.
        Patterns are those of `fnmatch`, with case; `*` also matches dots.
        """
        bits, weights, activations = self.bits, self.weights, self.activations
        for override in self.overrides:
            if fnmatch.fnmatchcase(module_name, override.match):
                bits = override.bits or bits
                weights = _changed(weights, override.weights)
                activations = _changed(activations, override.activations)
        weight_bits, activation_bits = _split(bits)
        if self.saturation == "reduce-range" and weight_bits == 8:
            weight_bits = 7  # two products of 255 and -64 still fit 16 bits
        return LayerBits(weight_bits, activation_bits, weights, activations)

    def updated(self, **changes: Any) -> Recipe:
        """A validated copy with `changes`; a mapping changes a section's (or `options`') keys and keeps the others.

        None means "as it was", also inside a section, except in `options`, where it is a value.

        Raises:
            RecipeError: as the constructor.
        """
        merged = self.model_dump()
        for key, change in changes.items():
            if isinstance(change, BaseModel):
                change = change.model_dump()
            if isinstance(change, Mapping) and isinstance(merged.get(key), dict):
                change = merged[key] | {k: v for k, v in change.items() if v is not None or key == "options"}
            if change is not None:
                merged[key] = change
        return Recipe.model_validate(merged)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file; an empty file is the default recipe.

        Raises:
            RecipeError: if it cannot be read, is no YAML mapping, or does not validate; names the file.
        """
        try:
            data = _yaml.load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"Recipe {path} cannot be read: {_reason(error)}.") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"Recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from None
        if data is not None and not isinstance(data, dict):
            raise RecipeError(f"Recipe {path} must hold keys and values such as 'bits: w8a8', not {_kind(data)}.")
        try:
            return cls.model_validate(data or {})
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """The recipe as YAML, every key written out; equal recipes give equal text, and reading it gives the recipe."""
        data = self.model_dump()
        data["overrides"] = [override.model_dump(exclude_none=True) for override in self.overrides]
        return _yaml.dump(data)

    def write(self, path: str | Path) -> None:
        """Write `to_yaml` to `path`, whole or not at all.

        Raises:
            RecipeError: if the file cannot be written.
        """
        path = Path(path)
        beside = path.with_name(path.name + ".part")
        try:
            beside.write_text(self.to_yaml(), encoding="utf-8", newline="\n")
            beside.replace(path)
        except OSError as error:
            raise RecipeError(f"Recipe {path} cannot be written: {_reason(error)}.") from None


def _split(bits: str) -> tuple[int, int]:
    match = _BITS.fullmatch(bits)
    return (int(match[1]), int(match[2])) if match else (32, 32)


def _changed(base: Granular, change: GranularChange | None) -> Granular:
    return base.model_copy(update=change.model_dump(exclude_none=True)) if change else base


def _plain(value: Any, name: str) -> Any:
    """`value` with tuples as lists and keys sorted, so that it survives YAML; ValueError where it cannot."""
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(entry, f"{name}.{key}") for key, entry in sorted(value.items())}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and not math.isnan(value)):
        return value
    raise ValueError(f"{name} must be a number, text, true, false, null, or lists and text-keyed mappings of these")


def _sentence(error: ErrorDetails) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"unknown recipe key {key!r}, {hint}"
    if error["type"] == "missing":
        return f"recipe key {key!r} is missing"
    if error["type"] == "literal_error":
        problem = f"{error['input']!r} is unknown, allowed: {error['ctx']['expected']}"
    else:
        said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if error["type"] == "model_type":
            said = "should be keys and values"
        problem = f"{said[0].lower()}{said[1:]}, got {_short(error['input'])}"
    return f"recipe key {key!r}: {problem}" if key else f"a recipe {problem}"


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    """Keys of the section at `loc`; an override's weights and activations have the recipe's keys."""
    sections: dict[str, type[BaseModel]] = {"ranges": Ranges, "calibration": Calibration, "overrides": Override}
    sections |= {"weights": Granular, "activations": Granular}
    names = [part for part in loc if isinstance(part, str)]
    return list((sections[names[-1]] if names else Recipe).model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else _short(value)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
