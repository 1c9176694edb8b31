"""Bridge blocks: run alone they give what the whole net gives, and the search only lowers their error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.test_qhyvit import problem

from qhyvit.graph.bridges import find_bridges
from qhyvit.methods.base import Problem
from qhyvit.methods.qhyvit import _spaces, options_of
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import QuantizedModel
from qhyvit.search.blocks import BlockError, BlockSearch, gather_blocks


def case() -> Problem:
    found = problem("w4a4", "simulate")
    found.per_channel = True
    return found


def test_a_block_alone_computes_what_the_quantized_net_computes() -> None:
    net = case()
    parameters, (block,) = set_ranges(net, "minmax"), find_bridges(net.graph)
    (data,) = gather_blocks(net, (block,), "none")
    images = torch.cat(list(net.pictures()))
    inside = set(block.nodes)
    sites = replace(
        net.sites,
        weights=tuple(s for s in net.sites.weights if s.node in block.members),
        activations=tuple(
            replace(s, readers=tuple(r for r in s.readers if r in inside))
            for s in net.sites.activations
            if inside & set(s.readers)
        ),
    )
    simulation = QuantizedModel(net.graph, sites, parameters, net.recipe, {}, False).simulation(integer=False)
    seen: dict[str, torch.Tensor] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Keep(simulation).run(images)
        values = BlockError(net, block, data).run(parameters)
    for name in block.outputs:
        torch.testing.assert_close(values[name], seen[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["none", "fisher"])
def test_the_error_of_a_block_never_rises(source: str) -> None:
    net = case()
    parameters, (block,) = set_ranges(net, "minmax"), find_bridges(net.graph)
    (data,) = gather_blocks(net, (block,), source)  # type: ignore[arg-type]
    error = BlockError(net, block, data)
    start = float(error.error(error.run(parameters)))
    before, after = BlockSearch(error, parameters, _spaces(net, options_of({}))).run()
    assert before == pytest.approx(start)
    assert after < 0.9 * before
    assert float(error.error(error.run(parameters))) == pytest.approx(after)


def test_without_quantizers_the_error_is_zero() -> None:
    net = case()
    (block,) = find_bridges(net.graph)
    (data,) = gather_blocks(net, (block,), "none")
    error = BlockError(net, block, data)
    error.sites, error.members = {}, set()
    assert float(error.error(error.run(set_ranges(net, "minmax")))) < 1e-6 * float(error.energy(block.outputs[0]))
