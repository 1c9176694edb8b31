"""From a picture to a model's input, as the model was trained: timm's evaluation transform, made a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, cast

from PIL import Image
from torch import Tensor

from qhyvit.data.pictures import to_rgb
from qhyvit.errors import DataError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")

# timm's defaults, for cards that leave a key out
_DEFAULTS: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise.

    Args:
        input_size: channels (3), height, width of the model's input.
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1, above 0.
        interpolation: one of `INTERPOLATIONS`.
        crop_pct: the crop's side over the resized picture's, in (0, 1].
        crop_mode: "center" (shorter side resized, centre cropped), "squash" (both sides resized) or "border" (longer
            side resized, padded).

    Raises:
        DataError: if a value is out of range.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __post_init__(self) -> None:
        size = _numbers("input_size", self.input_size)
        _require(len(size) == 3 and size[0] == 3, "input_size", self.input_size, "(3, height, width)")
        _require(all(s == int(s) > 0 for s in size), "input_size", self.input_size, "positive whole numbers")
        mean, std = (_per_channel(key, getattr(self, key)) for key in ("mean", "std"))
        _require(min(std) > 0, "std", self.std, "numbers above 0")
        _require(self.interpolation in INTERPOLATIONS, "interpolation", self.interpolation, ", ".join(INTERPOLATIONS))
        crop_pct = _numbers("crop_pct", (self.crop_pct,))[0]
        _require(0 < crop_pct <= 1, "crop_pct", self.crop_pct, "a number above 0 and at most 1")
        _require(self.crop_mode in CROP_MODES, "crop_mode", self.crop_mode, ", ".join(CROP_MODES))
        checked = {"input_size": tuple(map(int, size)), "mean": mean, "std": std, "crop_pct": crop_pct}
        for key, value in checked.items():
            object.__setattr__(self, key, value)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """From a timm data config, a weights card (key "input") or `to_dict`; other keys are left alone.

        Raises:
            DataError: if the input size is missing or a value is out of range.
        """
        known = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
        size = known.get("input_size", known.get("input"))
        if size is None:
            raise DataError("The preprocessing names no 'input_size'; give (3, height, width).")
        return cls(input_size=size, **{key: known[key] for key in _DEFAULTS})

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able; `from_config` takes them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def resized_side(self) -> int:
        """Pixels that the picture's side is resized to before cropping (the larger one, if the input is no square)."""
        return math.floor(max(self.input_size[1:]) / self.crop_pct)

    def crop(self, picture: Image.Image) -> Image.Image:
        """The geometric half: any picture to RGB, width and height those of the input."""
        return cast(Image.Image, _halves(self)[0](to_rgb(picture)))

    def normalise(self, picture: Image.Image) -> Tensor:
        """The arithmetic half: a cropped RGB picture to float32 (3, H, W)."""
        return cast(Tensor, _halves(self)[1](picture))

    def __call__(self, picture: Image.Image) -> Tensor:
        """A picture of any size and mode to float32 (3, H, W)."""
        return self.normalise(self.crop(picture))

    def __str__(self) -> str:
        def numbers(values: tuple[float, ...]) -> str:
            return " ".join(f"{value:g}" for value in values)

        _, height, width = self.input_size
        return (
            f"{height}×{width}, {self.interpolation}, crop {self.crop_pct:g} {self.crop_mode}, "
            f"mean {numbers(self.mean)}, std {numbers(self.std)}"
        )


@lru_cache(maxsize=16)
def _halves(preprocessing: Preprocessing) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """timm's transform, parted before the step that makes a tensor."""
    from timm.data import create_transform
    from timm.data.transforms import MaybeToTensor
    from torchvision.transforms import Compose

    steps = create_transform(is_training=False, **asdict(preprocessing)).transforms
    cut = next(i for i, step in enumerate(steps) if isinstance(step, MaybeToTensor))
    return Compose(steps[:cut]), Compose(steps[cut:])


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise DataError(f"Preprocessing key '{key}' is {value!r}; allowed: {allowed}.")


def _numbers(key: str, values: Any) -> tuple[float, ...]:
    """Finite numbers, or a DataError naming the key."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = (math.nan,)
    _require(all(map(math.isfinite, numbers)), key, values, "numbers")
    return numbers


def _per_channel(key: str, values: Any) -> tuple[float, ...]:
    """Three numbers; a single one stands for all channels."""
    numbers = _numbers(key, values if isinstance(values, (tuple, list)) else (values,))
    _require(len(numbers) in (1, 3), key, values, "one number a channel")
    return numbers * 3 if len(numbers) == 1 else numbers
