"""Recipes: what is accepted, what is said of what is not, overrides, and YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qhyvit.errors import RecipeError
from qhyvit.recipe import Override, Recipe


def test_defaults_are_the_documented_ones() -> None:
    recipe = Recipe()
    assert (recipe.weight_bits, recipe.activation_bits) == (8, 8)
    assert (recipe.weights.granularity, recipe.weights.scheme) == ("per-channel", "symmetric")
    assert (recipe.activations.granularity, recipe.activations.scheme) == ("per-tensor", "asymmetric")
    assert (recipe.calibration.size, recipe.calibration.batch, recipe.calibration.source) == (128, 4, None)
    assert (recipe.ranges.percentile, recipe.ranges.zero) == (99.99, "extend")


@pytest.mark.parametrize(
    ("bits", "widths"), [("w4a8", (4, 8)), ("w2a16", (2, 16)), ("w8a32", (8, 32)), ("w32a32", (32, 32))]
)
def test_bits_are_split(bits: str, widths: tuple[int, int]) -> None:
    recipe = Recipe(bits=bits)
    assert (recipe.weight_bits, recipe.activation_bits) == widths


@pytest.mark.parametrize("bits", ["w1a8", "w9a8", "w8", "8", "w8a8 ", "W8A8", "w8a80", "float", ""])
def test_other_bits_are_refused(bits: str) -> None:
    with pytest.raises(RecipeError, match=r"'bits'.*w8a8"):
        Recipe(bits=bits)


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"bits": 8}, "bits", "string"),
        ({"scope": "all"}, "scope", "'partial' or 'full'"),
        ({"seed": -1}, "seed", "-1"),
        ({"method": ""}, "method", "at least 1"),
        ({"weights": {"scheme": "skew"}}, "weights.scheme", "'skew' is unknown, allowed: 'symmetric' or 'asymmetric'"),
        ({"activations": {"granularity": "per-row"}}, "activations.granularity", "'per-channel' or 'per-tensor'"),
        ({"weights": "per-tensor"}, "weights", "keys and values"),
        ({"ranges": {"percentile": 101}}, "ranges.percentile", "100"),
        ({"ranges": {"zero": "drop"}}, "ranges.zero", "'extend' or 'clamp'"),
        ({"calibration": {"size": 0}}, "calibration.size", "1"),
        ({"calibration": {"batch": "many"}}, "calibration.batch", "'many'"),
        ({"bias_correction": "perhaps"}, "bias_correction", "'perhaps'"),
        ({"overrides": {"match": "*"}}, "overrides", "list"),
        ({"overrides": [{"bits": "w8a8"}]}, "overrides[0].match", "missing"),
        ({"overrides": [{"match": "*"}, {"match": "*", "bits": "w1a1"}]}, "overrides[1].bits", "'float'"),
        ({"overrides": [{"match": "*", "weights": {"scheme": 3}}]}, "overrides[0].weights.scheme", "'symmetric'"),
        ({"options": {"steps": {"first": object()}}}, "options", "options.steps.first"),
        ({"options": {1: 2}}, "options", "text"),
        ({"options": {"x": float("nan")}}, "options", "options.x"),
    ],
)
def test_every_error_names_its_key_and_what_is_allowed(changes: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**changes)
    assert f"recipe key '{key}'" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key", "near"),
    [
        ({"bit": "w8a8"}, "bit", "bits"),
        ({"weights": {"granularty": "per-tensor"}}, "weights.granularty", "granularity"),
        ({"calibration": {"sizes": 3}}, "calibration.sizes", "size"),
        ({"overrides": [{"match": "*", "wieghts": {}}]}, "overrides[0].wieghts", "weights"),
        ({"overrides": [{"match": "*", "weights": {"shceme": 1}}]}, "overrides[0].weights.shceme", "scheme"),
    ],
)
def test_unknown_key_suggests_the_near_one(changes: dict[str, Any], key: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**changes)
    assert str(caught.value) == f"unknown recipe key '{key}', did you mean '{near}'?"


def test_unknown_key_without_a_near_one_lists_the_known() -> None:
    with pytest.raises(RecipeError, match=r"'ranges\.qqq', known: percentile, zero\."):
        Recipe(ranges={"qqq": 1})


def test_a_section_keeps_its_own_defaults() -> None:
    recipe = Recipe(weights={"scheme": "asymmetric"}, activations={"scheme": "symmetric"})
    assert recipe.weights.granularity == "per-channel"
    assert recipe.activations.granularity == "per-tensor"


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError):
        recipe.bits = "w4a4"
    assert recipe.bits == "w8a8"


def test_the_last_matching_override_wins_key_by_key() -> None:
    recipe = Recipe(
        bits="w4a8",
        overrides=[
            Override(match="stages.*", bits="w8a8", weights={"granularity": "per-tensor"}),
            Override(match="stages.1.*", bits="float"),
            Override(match="*.conv", activations={"scheme": "symmetric"}),
        ],
    )
    outside = recipe.for_layer("head.fc")
    assert (outside.weight_bits, outside.activation_bits, outside.weights) == (4, 8, recipe.weights)
    first = recipe.for_layer("stages.0.conv")
    assert (first.weight_bits, first.weights.granularity, first.weights.scheme) == (8, "per-tensor", "symmetric")
    assert (first.activations.granularity, first.activations.scheme) == ("per-tensor", "symmetric")
    floating = recipe.for_layer("stages.1.conv")
    assert (floating.weight_bits, floating.activation_bits, floating.weights.granularity) == (32, 32, "per-tensor")
    # In the other order the float override is overruled.
    turned = recipe.updated(overrides=recipe.overrides[::-1])
    assert turned.for_layer("stages.1.conv").weight_bits == 8


def test_override_patterns_respect_case() -> None:
    assert Recipe(overrides=[Override(match="Head*", bits="float")]).for_layer("head.fc").weight_bits == 8


def test_updated_changes_only_what_is_named() -> None:
    recipe = Recipe(bits="w6a6", options={"a": 1, "b": 2}, calibration={"size": 32, "source": "photos"})
    changed = recipe.updated(bits=None, seed=3, calibration={"size": 64, "source": None}, options={"b": None})
    assert (changed.bits, changed.seed) == ("w6a6", 3)
    assert (changed.calibration.size, changed.calibration.source) == (64, "photos")
    assert changed.options == {"a": 1, "b": None}
    assert (recipe.seed, recipe.options) == (0, {"a": 1, "b": 2})
    assert recipe.updated(weights=changed.weights) == recipe


def test_updated_is_validated() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'scope'"):
        Recipe().updated(scop="full")
    with pytest.raises(RecipeError, match=r"'calibration\.size'"):
        Recipe().updated(calibration={"size": -2})


def test_equal_recipes_give_equal_yaml() -> None:
    one, two = (
        Recipe(options={"b": (1, 2), "a": {"y": 1, "x": 2}}),
        Recipe(options={"a": {"x": 2, "y": 1}, "b": [1, 2]}),
    )
    assert one == two
    assert one.to_yaml() == two.to_yaml()


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
granular = st.fixed_dictionaries(
    {}, optional={"scheme": st.sampled_from(["symmetric", "asymmetric"]), "granularity": st.just("per-tensor")}
)
override = st.fixed_dictionaries(
    {"match": st.text(min_size=1)},
    optional={"bits": st.sampled_from(["w4a4", "float"]), "weights": granular, "activations": granular},
)


@settings(deadline=None, max_examples=60)
@given(
    options=st.dictionaries(st.text() | st.sampled_from(["1e5", "yes", "<<", "2020-01-01"]), plain, max_size=4),
    overrides=st.lists(override, max_size=3),
    weights=granular,
    percentile=st.floats(50.001, 100),
    source=st.none() | st.text() | st.sampled_from(["1e-3", "null", "007", "a: b", "bücher/", "\x85", "\u2028 x"]),
)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, **fields: Any) -> None:
    recipe = Recipe(
        options=fields["options"],
        overrides=fields["overrides"],
        weights=fields["weights"],
        ranges={"percentile": fields["percentile"]},
        calibration={"source": fields["source"]},
    )
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write(path)
    again = Recipe.from_yaml(path)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml() == path.read_bytes().decode()


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_may_be_partial_or_empty(tmp_path: Path) -> None:
    assert Recipe.from_yaml(write(tmp_path, "# nothing\n")) == Recipe()
    recipe = Recipe.from_yaml(write(tmp_path, "bits: w4a8\noptions: {rate: 1e-3, much: -2E+4, text: '1e-3'}\n"))
    assert recipe == Recipe(bits="w4a8", options={"rate": 0.001, "much": -20000.0, "text": "1e-3"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits: w9a9", "recipe key 'bits'"),
        ("bitts: w8a8", "did you mean 'bits'?"),
        ("bits: w8a8\nbits: w4a4", "'bits' is given twice"),
        ("ranges: {zero: clamp, zero: extend}", "'zero' is given twice"),
        ("- bits", "a list"),
        ("bits: [", "not valid YAML"),
        ("1: 2", "recipe key '[1]'"),
        ("options: {when: 2020-01-01}", "options.when"),
        ("method: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_yaml_errors_name_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml cannot be read: No such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"source: b\xfccher")
    with pytest.raises(RecipeError, match=r"latin\.yaml cannot be read"):
        Recipe.from_yaml(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="cannot be written"):
        Recipe().write(tmp_path / "absent" / "recipe.yaml")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    Recipe(seed=1).write(path)
    real = Path.write_text

    def half(self: Path, text: str, **how: Any) -> int:
        real(self, text[: len(text) // 2], **how)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(RecipeError, match="No space left"):
        Recipe(seed=2).write(path)
    assert Recipe.from_yaml(path).seed == 1
