"""The JSON card beside a weights file: how the net is built and what pictures it expects."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qhyvit.errors import ModelError

_NOT_FROM_A_CARD = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


class Card(BaseModel):
    """What a card says; every key may be missing, unknown keys are ignored.

    Keys: `create` (arguments of `timm.create_model`), `classes` (names, by index), `input` (channels, height, width),
    `mean` and `std` (of pictures in 0..1), `crop_pct`, `crop_mode`, `interpolation`, `val_top1` (0..1) on `val`,
    `basis_for_claims` (false: trained too little for its losses under quantization to say something).
    In place of `mean`, `std` and `crop_pct` a card may have a sentence in `preprocessing`, such as
    "no resize; mean [0.5,0.5,0.5], std [0.5,0.5,0.5]".
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    create: dict[str, Any] = {}
    classes: tuple[str, ...] | None = Field(default=None, min_length=1)
    input: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = Field(default=None, gt=0)
    crop_mode: str | None = None
    interpolation: str | None = None
    val_top1: float | None = None
    val: str | None = None
    basis_for_claims: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_sentence(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("preprocessing"), str):
            return data
        said: dict[str, Any] = {
            key: [float(number) for number in numbers.split(",")]
            for key, numbers in re.findall(r"\b(mean|std) \[([-\d.,\s]+)\]", data["preprocessing"])
        }
        if "no resize" in data["preprocessing"]:
            said["crop_pct"] = 1.0
        return {**said, **data}

    @model_validator(mode="after")
    def _check(self) -> Card:
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) not in (1, self.input[0] if self.input else 3):
                raise ValueError(f"{key} must have one number per channel")
        # A card describes a net; it must not make us fetch or open other files.
        if refused := sorted(_NOT_FROM_A_CARD & self.create.keys()):
            raise ValueError(f"create must not hold {refused[0]!r}")
        return self

    @property
    def architecture(self) -> str | None:
        """Name of the timm net without its tag, where the card gives one."""
        name = self.create.get("model_name")
        return name.split(".")[0] if isinstance(name, str) else None

    @property
    def num_classes(self) -> int | None:
        """Number of classes, from the classes' names or from `create`."""
        given = self.create.get("num_classes")
        return len(self.classes) if self.classes else given if isinstance(given, int) else None

    @property
    def data_config(self) -> dict[str, Any]:
        """The card's part of a timm data config."""
        config = self.model_dump(include={"mean", "std", "crop_pct", "crop_mode", "interpolation"}, exclude_none=True)
        return config | ({"input_size": self.input} if self.input else {})


def read_card(weights: Path) -> Card:
    """The card beside `weights` (same name, suffix .json), or an empty one.

    Raises:
        ModelError: if the card is not JSON or a key has a wrong value.
    """
    path = weights.with_suffix(".json")
    if not path.is_file():
        return Card()
    try:
        return Card.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"Card {path}: {f'{key}: ' if key else ''}{first['msg']}; mend or remove it.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"Card {path} cannot be read as JSON ({error}); mend or remove it.") from None
