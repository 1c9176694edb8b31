"""Weights files and cards: containers, prefixes, damage, and files that would run code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qhyvit.errors import ModelError
from qhyvit.models.card import read_card
from qhyvit.models.state import classifier_classes, load_state, read_state

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, 2.0])}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": prefixed("module."), "optimizer": {"state": {0: torch.ones(2)}}},
        {"state_dict": {"a.weight": torch.zeros(2, 3)}, "state_dict_ema": STATE},
        {"model": {"state_dict": STATE}},
        {"state_dict": prefixed("module._orig_mod.")},
        STATE | {"epoch": 3},
    ],
)
def test_state_dicts_are_found(tmp_path: Path, suffix: str, content: dict[str, Any]) -> None:
    path = tmp_path / f"net{suffix}"
    torch.save(content, path)
    assert same(read_state(path), STATE)


def test_safetensors(tmp_path: Path) -> None:
    save_file(prefixed("module."), tmp_path / "net.safetensors")
    assert same(read_state(tmp_path / "net.safetensors"), STATE)


def test_a_prefix_of_only_some_names_is_kept(tmp_path: Path) -> None:
    mixed = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    torch.save(mixed, tmp_path / "net.pt")
    assert read_state(tmp_path / "net.pt").keys() == mixed.keys()


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    path, target = tmp_path / "net.pth", tmp_path / "ran"
    torch.save({"state_dict": STATE, "x": Malicious(target)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match=r"net\.pth .*refused.*state_dict"):
        read_state(path)
    assert not target.exists()


def test_arguments_of_a_training_script_are_passed_over(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "args": argparse.Namespace(x=1)}, tmp_path / "net.pth.tar")
    assert same(read_state(tmp_path / "net.pth.tar"), STATE)


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"state_dict": STATE, "args": argparse.Namespace(x=nn.ReLU())}])
def test_python_objects_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ModelError, match="Python objects"):
        read_state(tmp_path / "net.pt")


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, torch.ones(2), {}])
def test_files_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ModelError, match=r"net\.pt hold no state dict"):
        read_state(tmp_path / "net.pt")


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt", "net.pth", "net.bin"])
@pytest.mark.parametrize("damage", ["empty", "half", "noise"])
def test_damaged_files(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(STATE, path)
    else:
        torch.save(STATE, path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "noise": bytes(range(256)) * 4}[damage])
    with pytest.raises(ModelError, match=name):
        read_state(path)


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.pt do not exist"):
        read_state(tmp_path / "none.pt")
    with pytest.raises(ModelError, match="do not exist"):
        read_state(tmp_path)
    (tmp_path / "net.onnx").touch()
    with pytest.raises(ModelError, match=r"ending in \.safetensors, \.pt, \.pth or \.bin"):
        read_state(tmp_path / "net.onnx")


def module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.Linear(2, 2))


def test_batch_counters_may_be_missing() -> None:
    source, target = module(), module()
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    load_state(target, state, Path("x.pt"))
    assert torch.equal(target[2].weight, source[2].weight)


@pytest.mark.parametrize(
    ("drop", "add", "said"),
    [
        (["1.running_mean"], {}, r"\(missing: 1\.running_mean\)"),
        (["2.weight", "2.bias", "3.weight", "3.bias"], {}, r"missing: 2\.weight, 2\.bias, 3\.weight and 1 more"),
        ([], {"z": torch.ones(1)}, r"\(unexpected: z\)"),
        ([], {"2.weight": torch.ones(3, 4)}, r"of another shape: 2\.weight \[3, 4\] for \[2, 4\]"),
        ([], {"2.bias": torch.tensor([1.0, float("nan")])}, r"NaN in: 2\.bias"),
        (["2.bias"], {"z": torch.ones(1)}, r"missing: 2\.bias; unexpected: z"),
    ],
)
def test_misfits_are_named_and_nothing_is_loaded(drop: list[str], add: dict[str, Tensor], said: str) -> None:
    target = module()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = {key: value for key, value in module().state_dict().items() if key not in drop} | add
    with pytest.raises(ModelError, match=said):
        load_state(target, state, Path("x.pt"))
    assert same(target.state_dict(), before)


def test_classes_are_read_off_the_classifier() -> None:
    state = {"fc.weight": torch.ones(9, 4), "head.norm.weight": torch.ones(4), "head.fc.weight": torch.ones(5, 4)}
    assert classifier_classes(state, ("head",)) == 5
    assert classifier_classes(state, ("he",)) is None
    assert classifier_classes({"head.weight": torch.ones(6, 4, 1, 1)}, ("head", "head_dist")) == 6
    assert classifier_classes(state, ()) is None


def test_no_card_is_an_empty_card(tmp_path: Path) -> None:
    card = read_card(tmp_path / "net.safetensors")
    assert (card.num_classes, card.architecture, card.data_config) == (None, None, {})


def test_preprocessing_in_words(tmp_path: Path) -> None:
    words = "no resize; mean [0.5, 0.25,0.125], std [1,2e-1,0.3] of pixels in 0..1"
    (tmp_path / "net.json").write_text(json.dumps({"preprocessing": words, "std": [1, 1, 1]}))
    # A key stands against the sentence.
    config = read_card(tmp_path / "net.pt").data_config
    assert config == {"mean": (0.5, 0.25, 0.125), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "mend or remove"),
        ('{"input": [3, 64]}', "input"),
        ('{"mean": "grey"}', "mean"),
        ('{"mean": [1, 2]}', "one number per channel"),
        ('{"crop_pct": 0}', "crop_pct"),
        ('{"classes": []}', "classes"),
        ('{"create": {"checkpoint_path": "/etc/passwd"}}', "checkpoint_path"),
        ('{"create": {"pretrained": true}}', "pretrained"),
    ],
)
def test_bad_cards_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(ModelError, match=said) as caught:
        read_card(tmp_path / "net.safetensors")
    assert str(tmp_path / "net.json") in str(caught.value)
