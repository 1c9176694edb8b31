"""The transform is timm's, and its description survives being written down."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from qhyvit.data import Preprocessing
from qhyvit.data.preprocessing import CROP_MODES, INTERPOLATIONS
from qhyvit.errors import DataError

PREPROCESSINGS = st.builds(
    Preprocessing,
    input_size=st.tuples(st.just(3), st.integers(8, 96), st.integers(8, 96)),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 2)] * 3),
    interpolation=st.sampled_from(INTERPOLATIONS),
    crop_pct=st.floats(0.1, 1),
    crop_mode=st.sampled_from(CROP_MODES),
)


@given(PREPROCESSINGS)
@settings(deadline=None, max_examples=50)
def test_dict_round_trip_through_json(preprocessing: Preprocessing) -> None:
    again = Preprocessing.from_config(json.loads(json.dumps(preprocessing.to_dict())))
    assert again == preprocessing
    assert hash(again) == hash(preprocessing)


@given(PREPROCESSINGS, st.tuples(st.integers(1, 120), st.integers(1, 120)))
@settings(deadline=None, max_examples=50)
def test_any_picture_gets_the_input_shape(preprocessing: Preprocessing, size: tuple[int, int]) -> None:
    x = preprocessing(Image.new("L", size, 255))
    assert x.shape == preprocessing.input_size
    assert x.dtype == torch.float32
    assert x.isfinite().all()


def test_equals_timm_for_its_own_config(noise: Callable[..., Image.Image]) -> None:
    with torch.device("meta"):
        config = resolve_model_data_config(timm.create_model("mobilevit_xxs"))
    preprocessing = Preprocessing.from_config(config)
    picture = noise(3, (300, 280))
    assert torch.equal(preprocessing(picture), create_transform(**config, is_training=False)(picture))
    assert str(preprocessing) == "256×256, bicubic, crop 0.9 center, mean 0 0 0, std 1 1 1"


def test_card_keys_and_defaults() -> None:
    card = {"input": [3, 64, 64], "classes": ["a"], "crop_pct": None, "mean": 0.5}
    preprocessing = Preprocessing.from_config(card)
    assert preprocessing.input_size == (3, 64, 64)
    assert preprocessing.mean == (0.5, 0.5, 0.5)
    assert (preprocessing.crop_pct, preprocessing.crop_mode) == (0.875, "center")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_size", [1, 28, 28]),
        ("input_size", [3, 0, 28]),
        ("input_size", 224),
        ("mean", [0, 0]),
        ("std", [1, 0, 1]),
        ("std", "one"),
        ("interpolation", "random"),
        ("crop_pct", 0),
        ("crop_pct", float("nan")),
        ("crop_mode", "centre"),
    ],
)
def test_value_out_of_range_names_its_key(key: str, value: object) -> None:
    with pytest.raises(DataError, match=f"'{key}'"):
        Preprocessing.from_config({"input_size": (3, 32, 32)} | {key: value})


def test_missing_input_size() -> None:
    with pytest.raises(DataError, match="input_size"):
        Preprocessing.from_config({"mean": [0, 0, 0]})
