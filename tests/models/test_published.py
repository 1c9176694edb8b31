"""The file of the paper's families: counts that are counted anew, numbers that are quoted with their source."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from torch import nn

from qhyvit import terminal
from qhyvit.models import list_models, load
from qhyvit.models.cost import multiply_adds
from qhyvit.models.published import SECOND_HAND, counts, published

QUICK = {"mobilevit_xxs", "efficientformer_l1"}
NAMES = timm.list_models(list(load.FAMILIES))


def test_multiply_adds_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.depthwise = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
            self.norm, self.qkv = nn.BatchNorm2d(8), nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.depthwise(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            out: torch.Tensor = nn.functional.scaled_dot_product_attention(q, k, v)
            return out

    net, positions = Net(), 4 * 6
    layers = positions * (8 * 3 * 9 + 8 * 9 + 8 * 24)
    attention = 2 * positions * positions * 8
    assert multiply_adds(net, (3, 8, 12)) == layers + attention
    assert not net.conv.weight.is_meta
    assert net.training


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_counts_are_what_is_counted(name: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name)
    parameters = sum(p.numel() for p in net.parameters())
    assert counts(name) == (parameters, multiply_adds(net, net.pretrained_cfg["input_size"]))


def test_all_families_are_in_the_file() -> None:
    assert [name for name in ["demo", *NAMES] if counts(name) is None] == []
    assert len(NAMES) == 3 + 7 + 3 + 4 + 7


def test_the_demo_net_is_counted_at_its_own_size() -> None:
    demo = next(row for row in list_models() if row["name"] == "demo")
    module = load.load_model("demo").module
    assert demo["parameters"] * 1e6 == pytest.approx(sum(p.numel() for p in module.parameters()))
    assert demo["macs"] * 1e6 == pytest.approx(multiply_adds(module, demo["input_size"]))


def test_a_net_that_the_file_does_not_know_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    known = next(row for row in list_models() if row["name"] == "mobile_former_26m")
    monkeypatch.setattr(load, "FAMILIES", ("mobile_former_26m",))
    monkeypatch.setattr(load, "counts", lambda name: None if name == "mobile_former_26m" else counts(name))
    assert list_models()[-1] == known


def test_published_numbers_say_where_they_are_from() -> None:
    assert published("mobilevit_xxs")["w6a6"]["top1"] == 0.6633
    assert published("mobilevit_xxs")["w6a6"]["second_hand"]
    assert "Q-HyViT" in published("mobilevit_xxs")["w6a6"]["source"]
    assert published("mobile_former_96m").keys() == {"float"}
    assert not published("mobile_former_96m")["float"]["second_hand"]
    assert published("mobilevitv2_125") == published("resnet18") == {}
    for name in NAMES:
        found = published(name)
        scores = [found[kind]["top1"] for kind in ("float", "w8a8", "w6a6") if kind in found]
        assert scores == sorted(scores, reverse=True)  # fewer bits, fewer hits
        assert all(0.5 < score < 0.9 for score in scores)


def test_the_table_marks_second_hand_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal.show_models(list_models(), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80

    def row(name: str) -> list[str]:
        return next(line for line in lines if f" {name} " in line).replace("│", " ").split()

    assert row("mobile_former_26m") == ["mobile_former_26m", "3.23", "24", "224", "64.00", "61.78†", "51.06†"]
    assert row("mobilevitv2_125") == ["mobilevitv2_125", "7.48", "2817", "256"]
    assert any(line.startswith(SECOND_HAND) for line in lines[-3:])  # what the mark means


def test_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_models(list_models(), as_json=True)
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert {tuple(row) for row in rows} == {("name", "parameters", "macs", "input_size", "published")}
