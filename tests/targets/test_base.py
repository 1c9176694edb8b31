"""What a target refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qhyvit.errors import TargetError
from qhyvit.recipe import Recipe
from qhyvit.targets import TARGETS, Target


def recipe(**keys: Any) -> Recipe:
    return Recipe.model_validate(keys)


def nothing(*_: object) -> None: ...


NARROW = Target(
    "narrow",
    "",
    weight_bits=frozenset({8}),
    activation_bits=frozenset({8}),
    asymmetric_weights=False,
    per_channel_activations=False,
    export=nothing,
)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"bits": "w4a8"}, "4-bit weights"),
        ({"bits": "w8a4"}, "4-bit activations"),
        ({"bits": "w8a32"}, "weights quantized alone"),
        ({"bits": "w32a8"}, "activations quantized alone"),
        ({"weights": {"scheme": "asymmetric"}}, "asymmetric weights"),
        ({"activations": {"granularity": "per-channel"}}, "per-channel activation scales"),
        ({"overrides": [{"match": "b.*", "bits": "w8a6"}]}, "6-bit activations"),
    ],
)
def test_a_refusal_names_target_setting_layer_and_ways_out(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(TargetError) as caught:
        NARROW.check(recipe(**keys), ["b.c"])
    sentence = str(caught.value)
    for part in ("Target narrow", problem, "layer b.c", "override", "target simulate"):
        assert part in sentence


def test_float_layers_and_layers_without_sites_are_not_refused() -> None:
    NARROW.check(recipe(bits="w32a32"), ["a", "b"])
    NARROW.check(recipe(overrides=[{"match": "b", "bits": "float"}]), ["a", "b"])
    NARROW.check(recipe(overrides=[{"match": "b", "bits": "w4a4"}]), ["a"])
    NARROW.check(recipe(), [])


def test_the_outermost_module_has_no_name_but_is_named() -> None:
    with pytest.raises(TargetError, match="asked for in the outermost module;"):
        NARROW.check(recipe(bits="w4a4"), ["", "a"])


def test_reduced_range_counts_as_the_narrower_width() -> None:
    with pytest.raises(TargetError, match="7-bit weights"):
        NARROW.check(recipe(saturation="reduce-range"), ["a"])


@pytest.mark.parametrize(
    "keys",
    [
        {"bits": "w16a16"},
        {"bits": "w8a32"},
        {"bits": "w32a2"},
        {"weights": {"scheme": "asymmetric"}, "activations": {"granularity": "per-channel"}},
    ],
)
def test_simulate_takes_everything(keys: dict[str, Any]) -> None:
    TARGETS["simulate"].check(recipe(**keys), ["a"])


def test_targets_say_what_they_are() -> None:
    for name, target in TARGETS.items():
        assert target.name == name
        assert len(target.description) > 20
        assert (target.export is None) == (target.load is None) == (target.file_name is None)
        assert target.file_name is None or Path(target.file_name).name == target.file_name
