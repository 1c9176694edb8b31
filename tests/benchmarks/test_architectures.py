"""The table of nets that nobody prepared anything for."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from architectures import draw_what_is_nothing, lines


def test_a_net_gets_its_numbers_and_one_that_is_refused_the_reason() -> None:
    measured, refused = lines(["demo", "eva02_tiny_patch14_224"])
    assert measured.startswith("| `demo` | ")
    assert measured.count(" dB") == 2
    assert refused.startswith("| `eva02_tiny_patch14_224` | ")
    assert "no classifier" in refused
    assert measured.count("|") == refused.count("|")


def test_only_what_lets_nothing_through_is_drawn_anew() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    kept = net[0].weight.clone()
    with torch.no_grad():
        net[1].weight.fill_(1e-6)
    draw_what_is_nothing(net)
    assert torch.equal(net[0].weight, kept)
    assert float(net[1].weight.detach().abs().max()) > 1e-2
