"""Pictures as files hold them, made 8-bit RGB.

What a viewer would show: orientation applied, transparency over white, more than 8 bits scaled and not clipped.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PIXEL_LIMIT = 64_000_000
"""Pixels that are decoded at most (192 MB as RGB); a larger picture is refused. JPEGs are counted after reduction."""

_ORIENTATION = 0x0112
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def decode(data: bytes | Path, side: int) -> Image.Image:
    """Read one picture as RGB.

    A JPEG far larger than needed is decoded at 1/2, 1/4 or 1/8 of its size (draft mode), which is still at least
    4 × `side` in both directions.

    Args:
        data: the file's content, or where the file lies.
        side: pixels that the shorter side will be resized to.

    Raises:
        ValueError: if the picture is too large or too elongated, or holds no finite values.
        OSError: if it is truncated or no picture; Pillow may raise others.
    """
    try:
        picture = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except UnidentifiedImageError:
        raise ValueError("is no picture of a known format") from None
    except Image.DecompressionBombError:
        raise ValueError(f"has far more than {PIXEL_LIMIT:,} pixels") from None
    with picture:
        width, height = picture.size
        picture.draft(None, (4 * side, 4 * side))  # only JPEG heeds it
        if picture.width * picture.height > PIXEL_LIMIT:
            raise ValueError(f"is {width}×{height} pixels, more than {PIXEL_LIMIT:,}")
        if max(width, height) / max(1, min(width, height)) * side**2 > PIXEL_LIMIT:
            raise ValueError(f"is {width}×{height} pixels, too elongated to be resized")
        return to_rgb(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB, upright.

    Transparency is laid over white; 16-bit, 32-bit and float values are scaled to 8 bits (see `scale_to_8_bits`).

    Raises:
        ValueError: for a mode that has no way to RGB, and for float pictures with NaN or infinity.
    """
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in _DEEP:
        return Image.fromarray(scale_to_8_bits(np.asarray(picture))).convert("RGB")
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        layer = picture if picture.mode == "RGBA" else _to_rgba(picture)
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if picture.mode == "RGB":
        picture.load()  # a truncated file shows here
        return picture
    return picture.convert("RGB")


def _to_rgba(picture: Image.Image) -> Image.Image:
    # Pillow knows no direct way from the premultiplied "La" to RGBA
    return (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")


def scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Deep gray values to uint8, same shape.

    16-bit integers: 65535 becomes 255. Wider integers hold 8-bit or 16-bit data more often than not: values within
    0..255 stay, values within 0..65535 are read as 16-bit. Floats within 0..1 become 0..255, within 0..255 they are
    rounded. Whatever lies outside is stretched, the least value to 0 and the largest to 255.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    if values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    x = values.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("holds values that are not finite")
    low, high = float(x.min()), float(x.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        x *= 255
    elif low < 0 or high > 65535 or (values.dtype.kind == "f" and high > 255):
        x = (x - low) * (255 / (high - low or 1.0))
    elif high > 255:
        x /= 257
    return np.rint(x).astype(np.uint8)
