"""The zoo: nets by name, their cards, and what is said where there is none of that name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qhyvit.errors import DataError, ModelError
from qhyvit.evaluation import evaluate
from qhyvit.models import list_models, load_model
from qhyvit.models.zoo import FOLDER, zoo_names, zoo_weights

VAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "tiny-imagenet-100" / "val.zip"


@pytest.mark.parametrize("name", zoo_names())
def test_every_net_loads_as_float32_with_what_its_card_says(name: str) -> None:
    card = json.loads(zoo_weights(name).with_suffix(".json").read_text())
    loaded = load_model(name)
    assert loaded.name == name
    assert loaded.trained
    assert loaded.class_names == tuple(card["classes"])
    assert loaded.num_classes == 100
    assert list(loaded.preprocessing_config["input_size"]) == card["input"]
    assert loaded.preprocessing_config["crop_pct"] == card["crop_pct"]
    assert f"top-1 {card['val_top1']:.1%}" in loaded.source
    stored, state = load_file(zoo_weights(name)), loaded.module.state_dict()
    assert all(t.dtype == torch.float32 for t in state.values() if t.is_floating_point())
    assert all(torch.equal(state[key], tensor.to(state[key].dtype)) for key, tensor in stored.items())


@pytest.mark.parametrize("name", zoo_names())
def test_every_card_tells_how_its_net_came_about(name: str) -> None:
    card = json.loads(zoo_weights(name).with_suffix(".json").read_text())
    assert {"data", "recipe", "minutes", "pictures_seen", "val", "val_top1"} <= card.keys()
    assert card["recipe"]["name"] == name.removeprefix("zoo/")
    assert card["minutes"] > 0
    assert card["pictures_seen"] > 0
    assert card["basis_for_claims"] is (card["val_top1"] >= 0.35)
    assert ("no basis for a claim" in load_model(name).source) is not card["basis_for_claims"]


def test_an_unknown_name_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ModelError, match="did you mean zoo/mobilevit_xxs") as caught:
        load_model("zoo/mobilevit_xs")
    assert all(name in str(caught.value) for name in zoo_names())


def test_a_name_cannot_lead_out_of_the_zoo() -> None:
    assert (FOLDER / "../demo_mobilevit_xxs.safetensors").is_file()
    with pytest.raises(ModelError, match="The zoo has no net"):
        load_model("zoo/../demo_mobilevit_xxs")


def test_a_zoo_net_takes_no_other_weights() -> None:
    with pytest.raises(ModelError, match="has its own weights"):
        load_model("zoo/mobilevit_xxs", weights=zoo_weights("zoo/mobilevit_xxs"))
    with pytest.raises(ModelError, match="has its own weights"):
        load_model("zoo/mobilevit_xxs", pretrained=True)


def test_the_list_of_models_has_the_zoo() -> None:
    listed = {row["name"]: row for row in list_models()}
    for name in zoo_names():
        module = load_model(name).module
        assert listed[name]["parameters"] == pytest.approx(sum(p.numel() for p in module.parameters()) / 1e6)
        assert listed[name]["input_size"] == tuple(load_model(name).preprocessing_config["input_size"])


def test_the_zoo_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 40e6


@pytest.mark.slow
@pytest.mark.skipif(not VAL.is_file(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", zoo_names())
def test_the_cards_accuracy_is_what_evaluation_gives(name: str) -> None:
    card = json.loads(zoo_weights(name).with_suffix(".json").read_text())
    scores = evaluate(load_model(name), VAL)["float"]
    assert scores is not None
    assert scores.pictures == 2500
    assert scores.top1 == pytest.approx(card["val_top1"], abs=1e-9)


def test_without_pictures_of_its_classes_a_zoo_net_is_not_scored() -> None:
    with pytest.raises(DataError, match=r"other labels than the 100 classes of zoo/mobilevit_xxs; .* --data"):
        evaluate(load_model("zoo/mobilevit_xxs"))


def test_the_documentation_has_every_net_with_its_accuracy() -> None:
    rows = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text(encoding="utf-8").splitlines()
    for name in zoo_names():
        card = json.loads(zoo_weights(name).with_suffix(".json").read_text())
        row = next(row for row in rows if row.startswith(f"| `{name}` |"))
        assert f"| {100 * card['val_top1']:.1f} % |" in row
        assert ("no basis for a claim" in row) is not card["basis_for_claims"]
