"""Statistics gathered while pictures stream through a graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qhyvit.calibration.collect import Watcher, collect
from qhyvit.errors import ModelError
from qhyvit.pipeline import quantize
from tiny import SIDE, Tiny, fresh, quantized


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))


def split(x: Tensor, size: int) -> Iterator[Tensor]:
    return iter(torch.split(x, size))


@pytest.mark.parametrize("size", [1, 5])
def test_one_at_a_time_or_all_at_once(size: int) -> None:
    model, x = fresh(scope="full"), images()
    whole, parts = (collect(model.graph, model.sites, split(x, n)) for n in (len(x), size))
    assert whole.keys() == parts.keys() == {s.value for s in model.sites.activations}
    for name, expected in whole.items():
        found = parts[name]
        # kernels may round differently for batches of another size
        torch.testing.assert_close(found.low, expected.low, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.high, expected.high, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.channel_high, expected.channel_high, rtol=1e-5, atol=1e-6)
        assert found.count == expected.count
        assert found.histogram()[0].sum() == expected.histogram()[0].sum() == expected.count


def test_statistics_are_those_of_the_values() -> None:
    model, x = quantized(), images()
    statistics = collect(model.graph, model.sites, split(x, 4))
    assert statistics["pictures"].low == x.min()
    assert statistics["pictures"].high == x.max()
    channel_low = statistics["pictures"].channel_low
    assert channel_low is not None
    assert torch.equal(channel_low, x.amin((0, 2, 3)))
    assert statistics["pictures"].count == x.numel()
    (attention,) = (s for s in statistics if "softmax" in s)
    assert 0 <= statistics[attention].low < statistics[attention].high <= 1


def test_progress_counts_pictures() -> None:
    done: list[int] = []
    collect(quantized().graph, quantized().sites, split(images(), 5), advance=done.append)
    assert done == [5, 5, 2]


def test_no_gradients_are_kept() -> None:
    seen: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        x = images(2).requires_grad_()
        yield x
        seen.append(x)

    collect(quantized().graph, quantized().sites, batches())
    assert seen[0].grad is None


def test_batches_are_not_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[Tensor]:
        for _ in range(6):
            assert sum(r() is not None for r in alive) <= 1  # the one that was worked on last
            x = torch.randn(2, 3, SIDE, SIDE)
            alive.append(weakref.ref(x))
            yield x
            del x

    collect(quantized().graph, quantized().sites, batches())
    assert len(alive) == 6


def test_a_watcher_shows_what_is_wanted_and_frees_the_rest() -> None:
    graph, x = quantized().graph, images(3)
    names = [n.name for n in graph.graph.nodes if n.op == "call_function"]
    values: dict[str, weakref.ref[Tensor]] = {}
    alive: list[int] = []

    def watch(node: torch.fx.Node, value: Tensor) -> None:
        if isinstance(value, Tensor):
            values[node.name] = weakref.ref(value)
        alive.append(sum(r() is not None for r in values.values()))

    with torch.no_grad():
        out = Watcher(graph, names, watch).run(x)  # type: ignore[no-untyped-call]
        assert torch.equal(out, graph(x))
    assert list(values) == [n for n in names if n != "unbind"]
    assert max(alive) <= 6  # query, key, value and the value that is added later; not all twenty
    del out
    assert not any(r() is not None for r in values.values())


def test_only_wanted_values_are_shown() -> None:
    graph = quantized().graph
    seen: list[str] = []
    Watcher(graph, ["pictures", "softmax"], lambda node, value: seen.append(node.name)).run(images(1))  # type: ignore[no-untyped-call]
    assert seen == ["pictures", "softmax"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused(bad: float) -> None:
    model, x = quantized(), images(3)
    x[1, 2, 0, 0] = bad
    with pytest.raises(ModelError, match=r"^In pictures, .* is not finite: .*; check .* the calibration pictures\.$"):
        collect(model.graph, model.sites, [x])


def test_an_overflow_names_its_layer() -> None:
    net = Tiny()
    with torch.no_grad():
        net.stem.weight.mul_(1e20)
    with pytest.raises(ModelError, match=r"^In layer stem, .* is not finite: .*; check the model's weights") as caught:
        quantize(net, calib=images() * 1e20, input_size=SIDE)
    assert "\n" not in str(caught.value)
