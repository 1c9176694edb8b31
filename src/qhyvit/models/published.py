"""What is known of the paper's families without building them: size, cost, published accuracy (`families.yaml`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qhyvit import _yaml

FAMILIES_FILE = Path(__file__).parent / "families.yaml"
SECOND_HAND = "†"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: int
    macs: int
    float: str | None = None
    w8a8: str | None = None
    w6a6: str | None = None
    float_source: str = "qhyvit"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: dict[str, str]
    models: dict[str, _Entry]


@cache
def _families() -> _File:
    data = _yaml.load(FAMILIES_FILE.read_text(encoding="utf-8"))
    for entry in data["models"].values():  # 74.63 and 69.0† alike, as printed
        entry.update({key: str(entry[key]) for key in ("float", "w8a8", "w6a6") if key in entry})
    return _File.model_validate(data)


def counts(name: str) -> tuple[int, int] | None:
    """Parameters and multiply-adds of a net, or None where the file does not know it."""
    entry = _families().models.get(name)
    return (entry.parameters, entry.macs) if entry else None


def published(name: str) -> dict[str, dict[str, Any]]:
    """Published ImageNet-1k top-1 of a net, by "float", "w8a8" and "w6a6" as far as known.

    Each has `top1` (0..1), `second_hand` (not read in the authors' own text) and `source`.
    """
    file = _families()
    entry = file.models.get(name)
    found: dict[str, dict[str, Any]] = {}
    kinds: tuple[Literal["float", "w8a8", "w6a6"], ...] = ("float", "w8a8", "w6a6")
    for kind in kinds:
        printed: str | None = getattr(entry, kind, None)
        if entry is not None and printed is not None:
            found[kind] = {
                "top1": round(float(printed.removesuffix(SECOND_HAND)) / 100, 6),
                "second_hand": printed.endswith(SECOND_HAND),
                "source": file.sources[entry.float_source if kind == "float" else "qhyvit"],
            }
    return found
