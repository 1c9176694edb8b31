"""Every kind of picture becomes the RGB that a viewer shows, or says why not."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qhyvit.data.pictures import PIXEL_LIMIT, decode, scale_to_8_bits, to_rgb


def stored(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def png_header(width: int, height: int) -> bytes:
    """A palette PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", bytes(6))
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def test_grayscale_repeats_its_channel() -> None:
    gray = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3)
    rgb = pixels(decode(stored(gray, "PNG"), 8))
    assert (rgb == np.asarray(gray)[..., None]).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "La", "RGBa"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    straight = Image.new("RGBA", (3, 1))
    straight.putpixel((0, 0), (100, 100, 100, 255))
    straight.putpixel((1, 0), (100, 100, 100, 0))
    straight.putpixel((2, 0), (100, 100, 100, 128))
    picture = straight.convert("LA").convert(mode) if mode in ("LA", "La") else straight.convert(mode)
    data = picture if mode in ("La", "RGBa") else Image.open(io.BytesIO(stored(picture, "PNG")))
    opaque, clear, half = pixels(to_rgb(data))[0]
    assert (opaque == 100).all()
    assert (clear == 255).all()
    assert np.abs(half - 177).max() <= 1


def test_palette_with_transparent_entry_is_laid_over_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(decode(stored(palette, "PNG"), 2)).tolist() == [[[200, 10, 20], [0, 0, 0]]]
    for kind in ("PNG", "GIF"):
        rgb = pixels(decode(stored(palette, kind, transparency=1), 2))
        assert rgb.tolist() == [[[200, 10, 20], [255, 255, 255]]]


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7))])
def test_transparent_colour_key_becomes_white(mode: str, key: object) -> None:
    picture = Image.new(mode, (2, 1), key)
    picture.putpixel((1, 0), 50 if mode == "L" else (50, 50, 50))
    assert pixels(decode(stored(picture, "PNG", transparency=key), 2))[0, :, 0].tolist() == [255, 50]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels(decode(stored(red, kind), 16)) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_scaled_and_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    picture = Image.fromarray(ramp)
    assert picture.mode == "I;16"
    rgb = pixels(decode(stored(picture, kind), 16))
    assert np.abs(rgb[..., 1].ravel() - np.arange(256)).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 32768, 65535], np.uint16), [0, 128, 255]),
        (np.array([0, 17, 255], np.int32), [0, 17, 255]),
        (np.array([0, 32768, 65535], np.int32), [0, 128, 255]),
        (np.array([-10, 0, 10], np.int32), [0, 128, 255]),
        (np.array([0, 500_000, 1_000_000], np.int32), [0, 128, 255]),
        (np.array([0.0, 0.2, 1.0], np.float32), [0, 51, 255]),
        (np.array([0.0, 3.4, 200.0], np.float32), [0, 3, 200]),
        (np.array([-1.0, 0.0, 1.0], np.float32), [0, 128, 255]),
        (np.array([300.0, 300.0, 300.0], np.float32), [0, 0, 0]),
    ],
)
def test_deep_values(values: np.ndarray, expected: list[int]) -> None:
    assert scale_to_8_bits(values).tolist() == expected


def test_32_bit_and_float_tiff() -> None:
    for dtype, high in ((np.int32, 65535), (np.float32, 1.0)):
        values = np.array([[0, high], [high, 0]], dtype)
        assert pixels(decode(stored(Image.fromarray(values), "TIFF"), 2))[..., 0].tolist() == [[0, 255], [255, 0]]


def test_float_picture_with_nan_is_refused() -> None:
    data = stored(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF")
    with pytest.raises(ValueError, match="not finite"):
        decode(data, 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_applied_once(kind: str) -> None:
    upright = Image.new("RGB", (64, 32), "black")
    upright.paste("white", (0, 0, 32, 32))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: a viewer turns it by 90° clockwise
    data = stored(upright.transpose(Image.Transpose.ROTATE_90), kind, exif=exif)
    rgb = decode(data, 32)
    assert rgb.size == (64, 32)
    assert pixels(rgb)[:, :24].min() > 240
    assert pixels(rgb)[:, 40:].max() < 15
    assert pixels(to_rgb(rgb)).tolist() == pixels(rgb).tolist()


def test_very_large_jpeg_is_reduced_while_decoding_and_small_one_is_not(noise: Callable[..., Image.Image]) -> None:
    large = noise(0, (1600, 1200))
    data = stored(large, "JPEG", quality=95)
    reduced = decode(data, 100)
    assert reduced.size == (800, 600)  # at least 4 × 100 in both directions
    error = np.abs(pixels(reduced) - pixels(large.resize((800, 600), Image.Resampling.BOX)))
    assert error.mean() < 1
    assert decode(data, 200).size == (1600, 1200)


def test_huge_picture_is_refused_by_its_header() -> None:
    with pytest.raises(ValueError, match=r"10000×8000 pixels, more than"):
        decode(png_header(10_000, 8_000), 32)
    with pytest.raises(ValueError, match=rf"far more than {PIXEL_LIMIT:,}"):
        decode(png_header(100_000, 100_000), 32)


def test_elongated_picture_is_refused_before_it_is_resized() -> None:
    data = stored(Image.new("L", (1, 20_000)), "PNG")
    assert decode(data, 32).size == (1, 20_000)
    with pytest.raises(ValueError, match="elongated"):
        decode(data, 224)


def test_no_picture_and_truncated_picture(noise: Callable[..., Image.Image], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no picture of a known format"):
        decode(b"hello", 32)
    for kind in ("JPEG", "PNG", "TIFF"):
        data = stored(noise(1, (200, 200)), kind)
        (tmp_path / "cut").write_bytes(data[: len(data) // 2])
        with pytest.raises((OSError, ValueError, SyntaxError)):
            decode(tmp_path / "cut", 32)
