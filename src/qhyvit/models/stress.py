"""Stressed twins: the same function in float, as hard to quantize as you like.

Small nets trained from scratch are gentle. Published hybrid nets are not: the ranges of their channels differ widely,
and some values never come near zero, so that zero points overflow (Q-HyViT, arXiv 2303.12557). A twin gets both on
purpose, on the captured graph: channels of streams (`qhyvit.graph.streams`) are scaled and shifted in all producers
and back in all consumers. The same net and the same wish give the same twin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qhyvit.data.dataset import open_builtin
from qhyvit.data.preprocessing import Preprocessing
from qhyvit.errors import ModelError
from qhyvit.graph.capture import capture
from qhyvit.graph.ops import WEIGHTED, is_call
from qhyvit.graph.streams import Port, Stream, find_streams, rescale_streams

KINDS = {"ranges": 30.0, "shift": 1.0, "both": 30.0}  # and what stands for the number where none is given
PICTURES = 16
FEWEST = 4  # channels of a stream for which a median means something
_HELP = "must be ranges, shift or both, with a number and a seed where wanted: ranges:30, both:100:1"


@dataclass(frozen=True)
class Stress:
    """What is done to a net.

    Attributes:
        kind: "ranges": channels scaled by log-normal factors, so that the largest range of a stream's channels is
            `amount` times the median one (a stream that has such ranges already is left alone); "shift": channels
            shifted until they are positive, by `amount` times their range on average (between half and one and a half
            of it; more than a few ranges cost float32 its digits); "both": ranges with `amount`, shift by 1.
        amount: above 1 for ranges and both, above 0 for shift.
        seed: of the factors and offsets.
    """

    kind: str
    amount: float
    seed: int = 0

    def __post_init__(self) -> None:
        least = 0 if self.kind == "shift" else 1
        if self.kind not in KINDS or not least < self.amount < math.inf or self.seed < 0:
            raise ModelError(f"Stress {self} {_HELP}; the number must be above {least}.")

    @classmethod
    def parse(cls, text: str) -> Stress:
        """Read "ranges", "ranges:30" or "ranges:30:1".

        Raises:
            ModelError: if it is something else.
        """
        kind, *numbers = text.split(":")
        try:
            amount = float(numbers[0]) if numbers else KINDS[kind]
            return cls(kind, amount, *map(int, numbers[1:]))
        except (ValueError, KeyError, TypeError):
            raise ModelError(f"Stress {text!r} {_HELP}.") from None

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount:g}" + (f":{self.seed}" if self.seed else "")


def stress(
    model: nn.Module,
    kind: str,
    amount: float | None = None,
    *,
    seed: int = 0,
    images: Tensor,
    everywhere: bool = False,
) -> fx.GraphModule:
    """A twin of a net: equal to it in float up to rounding, harder to quantize.

    Args:
        model: a classifier or a captured graph; not changed.
        kind: as in `Stress`.
        amount: as in `Stress`; None: the kind's default, 30 for ranges and both, 1 for shift.
        seed: of the factors and offsets.
        images: preprocessed pictures (n, 3, H, W), on which the channels' ranges are measured.
        everywhere: stress every stream there is, behind norms and beside foreign channels too, where a tensor's other
            channels suffer most; else linear bottlenecks and the residual streams between convolution blocks (ranges:
            through ReLU too).

    Returns:
        The twin's captured graph, which `capture` takes again.

    Raises:
        CaptureError: if the net cannot be captured.
        ModelError: if nothing in the net can be stressed in this way.
    """
    asked = Stress(kind, KINDS.get(kind, 0.0) if amount is None else amount, seed)
    graph = capture(model, images[:1])
    relu = asked.kind != "shift"  # ReLU commutes with factors only
    streams = [s for s in find_streams(graph, relu=relu) if everywhere or _between_layers(graph, s)]
    measured = measure(graph, streams, images)
    rng = torch.Generator().manual_seed(asked.seed)
    changes: list[tuple[Stream, Tensor, Tensor | None]] = []
    for stream, ranges in zip(streams, measured, strict=True):
        gain, offset = torch.ones(stream.size).double(), torch.zeros(stream.size).double()
        if asked.kind != "shift":
            gain = _gains(ranges.high - ranges.low, asked.amount, rng)
        if asked.kind != "ranges":
            amount = asked.amount if asked.kind == "shift" else KINDS["shift"]
            offset = _offsets(stream, ranges, amount, rng)
        if bool((gain != 1).any()) or bool(offset.any()):
            changes.append((stream, 1 / gain, offset))
    if not changes:
        raise ModelError(
            f"Nothing in {type(model).__name__} can be stressed with {asked}; take another kind or number."
        )
    rescale_streams(graph, changes)
    return graph


def _between_layers(graph: fx.GraphModule, stream: Stream) -> bool:
    """Whether layers alone make all of the stream and layers read nothing beside it."""
    nodes = {node.name: node for node in graph.graph.nodes}
    layers = all(is_call(nodes[port.node], WEIGHTED) for port in stream.producers if nodes[port.node].op != "get_attr")
    return layers and all(bool((port.channels >= 0).all()) for port in (*stream.producers, *stream.consumers))


def default_images(config: Mapping[str, Any]) -> Tensor:
    """A few of the built-in photographs, (16, 3, H, W), preprocessed by a timm data config."""
    photos = open_builtin("photos", "calibration").shuffled(0)
    return next(iter(photos.batches(Preprocessing.from_config(config), PICTURES, PICTURES))).images


@dataclass
class Ranges:
    """Extremes of a stream's channels, float64 (K,) each; 0 where nothing was read.

    Attributes:
        low, high: over all that consumers read.
        shift_low, shift_high: over what an offset would reach in full.
    """

    low: Tensor
    high: Tensor
    shift_low: Tensor
    shift_high: Tensor


def measure(graph: fx.GraphModule, streams: list[Stream], images: Tensor) -> list[Ranges]:
    """Ranges of the channels of all streams on some pictures."""
    run = _Measurement(graph, streams)
    with torch.no_grad():
        for batch in torch.split(images, 4):
            run.run(batch)
    return [Ranges(*(torch.where(t.isfinite(), t, 0.0) for t in bounds)) for bounds in run.bounds]


class _Measurement(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, streams: list[Stream]) -> None:
        super().__init__(graph)
        self.bounds = [
            [torch.full((s.size,), sign * torch.inf, dtype=torch.float64) for sign in (1, -1, 1, -1)] for s in streams
        ]
        self.ports: dict[str, list[tuple[int, Port]]] = {}
        for number, stream in enumerate(streams):
            for port in stream.consumers:
                self.ports.setdefault(port.node, []).append((number, port))

    def run_node(self, n: fx.Node) -> Any:
        for number, port in self.ports.get(n.name, ()):
            x: Tensor = self.env[n.args[0]]  # type: ignore[index]
            axis = x.ndim - 1 if n.target == torch.ops.aten.linear.default else 1
            flat = x.movedim(axis, 0).flatten(1).double().cpu()
            held, reached = port.channels >= 0, port.share > 1 - 1e-6
            for i, (mask, largest) in enumerate([(held, False), (held, True), (reached, False), (reached, True)]):
                values = (flat.amax(1) if largest else flat.amin(1))[mask]
                kind = "amax" if largest else "amin"
                self.bounds[number][i].scatter_reduce_(0, port.channels[mask], values, kind)
        return super().run_node(n)


def _gains(ranges: Tensor, spread: float, rng: torch.Generator) -> Tensor:
    """Log-normal factors (K,) that bring the largest range to `spread` times the median."""
    drawn = torch.randn(len(ranges), generator=rng, dtype=torch.float64)
    live = ranges > 0
    if int(live.sum()) < FEWEST:
        return torch.ones_like(drawn)

    def ratio(width: float) -> float:
        scaled = ranges[live] * torch.exp(width * drawn[live])
        return float(scaled.max() / scaled.median())

    low, high = 0.0, 1.0
    if ratio(low) >= spread:
        return torch.ones_like(drawn)
    while ratio(high) < spread:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < spread else (low, middle)
    return torch.exp(high * drawn)


def _offsets(stream: Stream, ranges: Ranges, amount: float, rng: torch.Generator) -> Tensor:
    """Offsets (K,) after whose subtraction channels lie above 0."""
    drawn = torch.rand(stream.size, generator=rng, dtype=torch.float64)
    away = amount * (0.5 + drawn) * (ranges.shift_high - ranges.shift_low)
    return torch.where(stream.shiftable, ranges.shift_low - away, 0.0)
