"""Losses add up to what is lost, and name the layer that was made bad."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny
from qhyvit.cli import app
from qhyvit.diagnosis import losses
from qhyvit.pipeline import quantize
from qhyvit.store import save


def test_every_operator_with_codes_is_there_and_shares_add_up() -> None:
    model = tiny.quantized()
    found = losses(model, tiny.calibration(), limit=8)
    layers = {s.node for s in model.sites.weights}
    assert layers <= {loss.node for loss in found}
    assert sum(loss.share for loss in found) == pytest.approx(1)
    assert [loss.share for loss in found] == sorted((loss.share for loss in found), reverse=True)


def test_a_spoilt_layer_comes_first_and_is_bad_alone() -> None:
    model = copy.deepcopy(tiny.fresh())
    spoilt = next(s.node for s in model.sites.weights if s.module == "depthwise")
    model.parameters.weights[spoilt].scale.mul_(100)  # all its codes become 0, ±1
    first, *rest = losses(model, tiny.calibration(), limit=8)
    assert first.node == spoilt
    assert first.alone_db < min(loss.alone_db for loss in rest) - 10
    behind = [loss for loss in rest if loss.module in ("qkv", "head")]
    assert behind
    assert all(loss.in_net_db < loss.alone_db - 5 for loss in behind)  # noise that came from before them


def test_one_operator_alone_is_the_whole_net_if_nothing_else_is_quantized() -> None:
    model = quantize(
        tiny.Tiny(),
        calib=tiny.calibration(),
        input_size=tiny.SIDE,
        bits="w4a4",
        method="mse",
        target="simulate",
        overrides=[{"match": "*", "bits": "float"}, {"match": "head", "bits": "w4a4"}],
    )
    (only,) = losses(model, tiny.calibration(), limit=8)
    assert only.module == "head"
    assert only.logits_db == pytest.approx(only.alone_db)
    assert only.logits_db == pytest.approx(only.in_net_db, abs=0.01)


def test_what_a_layer_loses_alone_is_what_it_loses_in_a_net_of_float() -> None:
    """Its bias makes up for its own codes, and not for what came before it in the quantized net."""
    kind: dict[str, Any] = {"bits": "w4a4", "bias_correction": True, "target": "simulate"}
    whole = losses(tiny.fresh(**kind), tiny.calibration(), limit=16)
    for module in ("depthwise", "qkv", "head"):
        only_one = [{"match": "*", "bits": "float"}, {"match": module, "bits": "w4a4"}]
        alone = losses(tiny.fresh(**kind, overrides=only_one), tiny.calibration(), limit=16)
        (one,) = (loss for loss in alone if loss.module == module)
        (same,) = (loss for loss in whole if loss.module == module)
        assert same.alone_db == pytest.approx(one.in_net_db, abs=0.01)


def test_what_an_activation_cuts_off_is_no_loss() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.loud, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
                nn.init.constant_(self.loud.bias, 100)  # type: ignore[arg-type]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(nn.functional.relu6(self.loud(x)).mean((2, 3)))
            return out

    model = quantize(Cut(), calib=tiny.calibration(), input_size=tiny.SIDE, method="mse")
    (spoilt,) = (s.node for s in model.sites.weights if s.module == "loud")
    model.parameters.weights[spoilt].scale.mul_(50)
    (loud,) = (loss for loss in losses(model, tiny.calibration(), limit=8) if loss.module == "loud")
    assert min(loud.in_net_db, loud.alone_db) > 100


def test_sizes_read_from_quantized_values_are_no_operators() -> None:
    class Tokens(tiny.Tiny):
        def forward(self, x: Tensor) -> Tensor:
            x = self.depthwise(self.norm(self.stem(x)).relu())
            tokens = self.place[:, 0, :8].expand(x.shape[0], -1)  # one for all pictures, as Mobile-Former's
            out: Tensor = self.head(torch.cat([tokens, x.mean((2, 3))[:, 8:]], 1))
            return out

    kind: dict[str, Any] = {"bits": "w8a8", "method": "mse", "scope": "full", "target": "simulate"}
    model = quantize(Tokens(), calib=tiny.calibration(), input_size=tiny.SIDE, **kind)
    assert any("sym_size" in reader for site in model.sites.activations for reader in site.readers)
    assert not any("sym_size" in loss.node for loss in losses(model, tiny.calibration(), limit=4))


def test_inspect_prints_them(tmp_path: Path) -> None:
    folder = save(tiny.quantized(), tmp_path / "out")
    run = ["inspect", "--losses", str(folder), "--data", str(tiny.calibration()), "--limit", "4"]
    result = CliRunner().invoke(app, run, catch_exceptions=False)
    assert "depthwise" in result.stdout
    found = json.loads(CliRunner().invoke(app, [*run, "--json"], catch_exceptions=False).stdout)["losses"]
    assert {"module", "share", "alone_db", "in_net_db", "logits_db", "node"} == set(found[0])


def test_inspect_wants_a_result_for_losses() -> None:
    result = CliRunner().invoke(app, ["inspect", "--losses", "demo"])
    assert "is no result" in str(result.exception)
