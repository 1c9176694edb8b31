"""Stressed twins: the same function in float, ranges as asked, through every command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import qhyvit
from qhyvit.cli import app
from qhyvit.errors import CaptureError, ModelError
from qhyvit.graph.capture import capture
from qhyvit.graph.streams import find_streams
from qhyvit.models.load import LoadedModel, load_model, stressed
from qhyvit.models.stress import KINDS, Stress, _between_layers, default_images, measure, stress
from qhyvit.quantized import copy_graph

SIDE = 32


class Bottlenecks(nn.Module):
    """A residual stream of 16 channels between convolution blocks, then a linear head."""

    def __init__(self, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, 4, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 32, 1), activation(), nn.Conv2d(32, 16, 1)) for _ in range(2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def images(count: int = 4, side: int = SIDE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(Bottlenecks(), input_size=SIDE)


def difference(model: nn.Module, twin: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = model(x), twin(x)
    return float((a - b).abs().max() / a.abs().max())


def ranges_of(twin: fx.GraphModule, x: Tensor) -> Any:
    (stream,) = (s for s in find_streams(twin) if _between_layers(twin, s))
    (ranges,) = measure(twin, [stream], x)
    return ranges


@pytest.mark.parametrize(
    "name",
    [
        "demo",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("mobilevit_xxs", "mobilevitv2_050", "efficientformer_l1")),
    ],
)
def test_the_twin_is_the_same_function(name: str) -> None:
    model = load_model(name, input_size=64 if name.startswith("mobilevit") else None)
    x = default_images(model.preprocessing_config)[:4]
    graph = capture(model.module, x[:1])
    exact = copy_graph(graph).double()
    twin = stress(graph, "both", images=x[:2])
    if model.trained:  # random nets amplify the rounding of float32 sums, their own as well
        assert difference(graph, twin, x) <= 1e-5
    assert difference(exact, twin.double(), x.double()) <= 1e-5  # float32 weights
    twin = stress(exact, "both", images=x[:2].double(), everywhere=True)
    assert difference(exact, twin, x.double()) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_same_function(kind: str) -> None:
    model = Bottlenecks()
    assert difference(model, stress(model, kind, images=images()), images(7)) <= 1e-5
    exact = stress(model.double(), kind, images=images().double())
    assert difference(model, exact, images(7).double()) <= 1e-10


@pytest.mark.parametrize("spread", [10, 100])
def test_ranges_reach_the_spread_asked_for(spread: float) -> None:
    found = ranges_of(stress(Bottlenecks(), "ranges", spread, images=images()), images())
    widths = found.high - found.low
    assert float(widths.max() / widths.median()) == pytest.approx(spread, rel=1e-3)


@pytest.mark.parametrize("amount", [1.0, 4.0])
def test_shifted_channels_stay_above_zero_by_the_amount_asked_for(amount: float) -> None:
    found = ranges_of(stress(Bottlenecks(), "shift", amount, images=images()), images())
    away = found.shift_low / (found.shift_high - found.shift_low)
    assert amount * 0.499 <= float(away.min()) <= float(away.max()) <= amount * 1.501


def test_the_same_seed_gives_the_same_twin_and_another_seed_another() -> None:
    one, same, other = (stress(Bottlenecks(), "both", seed=seed, images=images()) for seed in (3, 3, 4))
    weights = [dict(twin.named_buffers()) for twin in (one, same, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0] if name in weights[2])


def test_the_model_is_left_alone_and_a_captured_graph_is_taken_too() -> None:
    model = Bottlenecks()
    graph = capture(model, images(1))
    before = graph(images())
    twin = stress(graph, "ranges", images=images())
    assert torch.equal(graph(images()), before)
    assert not torch.equal(dict(twin.named_buffers())["stem_weight_1"], model.stem.weight)


def test_capture_copies_a_captured_graph_with_its_names() -> None:
    graph = capture(Bottlenecks(), images(1))
    again = capture(graph, images(3))
    assert again is not graph
    for old, new in zip(graph.graph.nodes, again.graph.nodes, strict=True):
        assert (new.name, new.op, new.target) == (old.name, old.op, old.target)
        assert new.op == "output" or new.meta == old.meta
    assert torch.equal(again(images()), graph(images()))
    for buffer in again.buffers():
        buffer.zero_()
    assert bool(graph(images()).any())
    with pytest.raises(CaptureError, match="3×32×32, not 3×64×64"):
        capture(graph, images(1, 64))


def test_factors_but_no_offsets_go_through_relu() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.SiLU(), nn.Flatten(), nn.Linear(512, 5)
    )
    twin = stress(net, "both", 30.0, images=images())
    assert difference(net, twin, images(8)) < 1e-5
    ranges = measure(twin, find_streams(twin, relu=True)[:1], images())[0]
    assert float(ranges.high.max() / ranges.high.median()) == pytest.approx(30, rel=0.1)
    assert float(ranges.low.min()) == 0
    with pytest.raises(ModelError, match="can be stressed with shift"):
        stress(net, "shift", images=images())


def test_what_has_no_streams_cannot_be_stressed() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.only(x.mean((2, 3)))
            return out

    with pytest.raises(ModelError, match="Nothing in Plain can be stressed"):
        stress(Plain(), "ranges", images=images())


@pytest.mark.parametrize(
    "text", ["range:30", "ranges:1", "ranges:x", "ranges:nan", "shift:0", "both:30:-1", "both:3:1:1", ""]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="must be ranges, shift or both"):
        Stress.parse(text)


def test_defaults_and_text() -> None:
    assert Stress.parse("both") == Stress("both", 30.0, 0)
    assert [str(Stress.parse(t)) for t in ("ranges:10", "shift", "both:30:7")] == ["ranges:10", "shift:1", "both:30:7"]


def test_a_twin_goes_all_the_way(loaded: LoadedModel, tmp_path: Path) -> None:
    """Quantized, exported, verified, saved and loaded; harder than the net itself, and still called what it is."""
    twin = stressed(loaded, "ranges:100")
    assert twin.source == f"{loaded.source}, stressed with ranges:100"
    hard = qhyvit.quantize(twin, calib=images(16), method="minmax")
    easy = qhyvit.quantize(loaded, calib=images(16), method="minmax")
    assert "stressed with ranges:100" in hard.info["source"]
    assert {s.module for s in hard.sites.weights} == {s.module for s in easy.sites.weights}

    def error(model: Any) -> float:
        return difference(model.graph, model.simulation(), images(16))

    assert error(hard) > 2 * error(easy)
    qhyvit.save(hard, tmp_path / "out")
    again = qhyvit.load(tmp_path / "out")
    assert again.info == hard.info
    assert torch.equal(again.simulation()(images()), hard.simulation()(images()))
    found = qhyvit.verify(again, "photos", folder=tmp_path / "out", limit=8)
    assert found.sqnr_db > 30
    float_scores = qhyvit.evaluate(replace(twin, num_classes=1000), "photos", limit=8)["float"]
    assert float_scores is not None
    assert float_scores.pictures == 8


def test_the_option_of_the_command_line() -> None:
    arguments = ["evaluate", f"{__name__}:Bottlenecks", "--input-size", str(SIDE), "--data", "photos", "--limit", "4"]
    result = CliRunner().invoke(app, [*arguments, "--stress", "both:30"])
    assert result.exit_code != 0  # it has not as many classes as the pictures, but was built
    assert "stressed with both:30" in result.stderr
    refused = CliRunner().invoke(app, ["quantize", "--stress", "hard"])
    assert isinstance(refused.exception, ModelError)
