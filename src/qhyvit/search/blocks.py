"""Bridge block reconstruction: members of a block are chosen by the error of the *block's* output.

Q-HyViT (arXiv 2303.12557): inside a bridge block O = w_n · … · w_1 · x_bb, measured against the clean float output;
between the members the real operators (reshape, norm, activation) run. What else the block hands out, such as the
stream that goes past the attention, counts too: it may be all that O does not depend on. Members are walked in turn,
all of them quantized, the incumbents being what the layer-wise search found: coordinate descent, so the error never
rises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qhyvit.calibration.collect import Watcher
from qhyvit.calibration.gradients import Source
from qhyvit.calibration.samples import normalised
from qhyvit.graph.bridges import BridgeBlock, find_bridges
from qhyvit.graph.ops import constant, shape, weight_of
from qhyvit.methods.base import Problem
from qhyvit.progress import task
from qhyvit.quantized import Parameters
from qhyvit.search.candidates import Candidates
from qhyvit.search.gather import BATCH, Gradients
from qhyvit.search.layers import Spaces
from qhyvit.search.operands import Choice, Range, Space, search

NUMBERS = 1 << 18  # of a block's largest value that are kept, whole pictures

COARSE = 8  # every so many candidates are tried first: running a block costs more than running a layer


@dataclass
class BlockData:
    """What one block computes on some pictures in the float network.

    Attributes:
        inputs: values that the block reads, by name.
        targets: clean values of the outputs, and of the block's other nodes that something outside it reads.
        weights: g² of the targets, or None for all alike.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    weights: dict[str, Tensor | None]


class BlockError:
    """Runs one block with quantizers in place and compares it with the float network.

    Args:
        problem: the net.
        block: the block.
        data: its clean inputs and outputs.
        residual_term: whether nodes that are read outside the block count as its outputs do.
    """

    def __init__(self, problem: Problem, block: BridgeBlock, data: BlockData, *, residual_term: bool = True) -> None:
        self.problem, self.block, self.data = problem, block, data
        by_name = {n.name: n for n in problem.graph.graph.nodes}
        self.nodes = [by_name[n] for n in block.nodes]
        self.members = {s.node for s in problem.sites.weights if s.node in block.members}
        self.compared = [t for t in data.targets if residual_term or t in block.outputs]
        self._energies = {t: self._energy(t) for t in self.compared}
        self.sites = {
            (reader, s.value): s for s in problem.sites.activations for reader in s.readers if reader in block.nodes
        }

    def run(self, parameters: Parameters, env: dict[str, Tensor] | None = None, start: int = 0) -> dict[str, Tensor]:
        """All values of the block; `env` holds those before node number `start` already."""
        values = dict(self.data.inputs) if env is None else env
        for node in self.nodes[start:]:
            values[node.name] = self._node(node, values, parameters)
        return values

    def _node(self, node: fx.Node, values: dict[str, Tensor], parameters: Parameters) -> Any:
        def operand(n: fx.Node) -> Any:
            if n.op == "get_attr":
                return constant(self.problem.graph, n)
            value = values[n.name]
            if (node.name, n.name) in self.sites:
                return parameters.activations[n.name](value)
            return value

        args = list(fx.node.map_arg(node.args, operand))
        kwargs = fx.node.map_arg(node.kwargs, operand)
        if node.name in self.members:
            args[1] = parameters.weights[node.name](args[1])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def error(self, values: dict[str, Tensor]) -> Tensor:
        """The weighted squared error of each value compared as a share of its energy, summed over them; float64 ()."""
        total = torch.zeros((), dtype=torch.float64)
        for name in self.compared:
            e, weight = (values[name] - self.data.targets[name]).square_(), self.data.weights[name]
            total += (e if weight is None else e.mul_(weight)).sum().double() / self._energies[name]
        return total

    def _energy(self, name: str) -> Tensor:
        weight, target = self.data.weights[name], self.data.targets[name].square()
        energy = (target if weight is None else target.mul_(weight)).sum().double()
        return torch.where(energy > 0, energy, 1.0)  # a value that is 0 throughout has no relative error

    def first(self, site: str) -> int:
        """Number of the first node that reads a site's quantized value."""
        return next(i for i, n in enumerate(self.nodes) if (n.name, site) in self.sites)


def gather_blocks(problem: Problem, blocks: tuple[BridgeBlock, ...], source: Source) -> list[BlockData]:
    """The clean inputs and outputs of blocks on the first calibration pictures, as many as `NUMBERS` allows each."""
    nodes = {n.name: n for n in problem.graph.graph.nodes}
    sizes = [max(math.prod(shape(nodes[n])) for n in block.nodes if "shape" in nodes[n].meta) for block in blocks]
    counts = [min(max(1, NUMBERS // size), problem.picture_count) for size in sizes]
    pictures: list[Tensor] = []
    for images in problem.pictures():
        pictures.append(images)
        if sum(map(len, pictures)) >= max(counts, default=0):
            break
    g = Gradients(problem, source)
    return [_block_data(problem, nodes, b, torch.cat(pictures)[:n], g) for b, n in zip(blocks, counts, strict=True)]


def _block_data(
    problem: Problem, nodes: dict[str, fx.Node], block: BridgeBlock, images: Tensor, gradients: Gradients
) -> BlockData:
    targets = list(dict.fromkeys([*block.outputs, *_handed_out(nodes, block)]))
    seen: dict[str, Any] = {}
    with torch.no_grad():
        Watcher(problem.graph, {*block.inputs, *targets}, lambda n, v: seen.__setitem__(n.name, v)).run(images)
    weights: dict[str, Tensor | None] = dict.fromkeys(targets)
    parts = [gradients.of(set(targets), piece) for piece in torch.split(images, BATCH)]
    if all(name in part for part in parts for name in targets):
        weights = {name: normalised(torch.cat([part[name] for part in parts]).square_()) for name in targets}
    return BlockData({n: seen[n] for n in block.inputs}, {n: seen[n] for n in targets}, weights)


def _handed_out(nodes: dict[str, fx.Node], block: BridgeBlock) -> Iterator[str]:
    """The block's values that something outside reads; of a list of parts, the value that was split."""
    inside = set(block.nodes)
    for name in block.nodes:
        node = nodes[name]
        if {u.name for u in node.users} <= inside:
            continue
        while "shape" not in node.meta:
            node = node.all_input_nodes[0]
        if node.name in inside:
            yield node.name


class BlockSearch:
    """Chooses the quantizers of one block's members by the block's error.

    Args:
        error: the block.
        parameters: incumbents, replaced by what is found.
        spaces: what may be chosen.
    """

    def __init__(self, error: BlockError, parameters: Parameters, spaces: Spaces) -> None:
        self.error, self.parameters, self.spaces = error, parameters, spaces
        self.problem = error.problem
        self.weights = {s.node: s for s in self.problem.sites.weights}
        self.activations = {s.value: s for s in self.problem.sites.activations}

    def run(self) -> tuple[float, float]:
        """Search; returns the block's error before and after."""
        before = float(self.error.error(self.error.run(self.parameters)))
        last = before
        for round_ in range(self.spaces.rounds):
            for node in self.error.nodes:
                for site in self._inputs(node):
                    self._activation(site, round_)
                if node.name in self.error.members:
                    self._weight(node, round_)
            now = float(self.error.error(self.error.run(self.parameters)))
            if now > 0.999 * last:
                return before, now
            last = now
        return before, last

    def _inputs(self, node: fx.Node) -> list[str]:
        """Sites that a node reads and nothing outside the block; each once, at its first reader."""
        inside = set(self.error.block.nodes)
        found = [
            v for (reader, v), s in self.error.sites.items() if reader == node.name and inside.issuperset(s.readers)
        ]
        return [v for v in found if self.error.nodes[self.error.first(v)] is node]

    def _weight(self, node: fx.Node, round_: int) -> None:
        weight, _ = weight_of(self.problem.graph, node)  # type: ignore[misc]
        rows = weight.flatten(1)
        extremes = Range(weight.min(), weight.max(), rows.amin(1), rows.amax(1), 0)
        space = self.spaces.weight(self.weights[node.name])
        self._choose(node.name, self.parameters.weights, self.error.nodes.index(node), extremes, space, round_)

    def _activation(self, site: str, round_: int) -> None:
        statistics, axis = self.problem.statistics[site], self.activations[site].channel_axis
        extremes = Range(statistics.low, statistics.high, statistics.channel_low, statistics.channel_high, axis)
        space = self.spaces.activation(self.activations[site])
        self._choose(site, self.parameters.activations, self.error.first(site), extremes, space, round_)

    def _choose(self, name: str, table: dict[str, Any], start: int, extremes: Range, space: Space, round_: int) -> None:
        """Search one operand; what comes before its first reader is computed once."""
        inside = {n.name for n in self.error.nodes[start:]}
        settled = {k: v for k, v in self.error.run(self.parameters).items() if k not in inside}
        incumbent = table[name]

        def evaluate(candidates: Candidates) -> Tensor:
            found = []
            for one in candidates.split(1):
                table[name] = one.build(extremes.axis)
                found.append(self.error.error(self.error.run(self.parameters, dict(settled), start)))
            table[name] = incumbent
            return torch.stack(found)[:, None].float()

        if space.coarse > 1:
            space = replace(space, coarse=COARSE)
        first = Choice(incumbent, float(evaluate(Candidates.of(incumbent)).sum()))
        table[name] = search(space, extremes, evaluate, first, separable=False, again=round_ > 0).quantizer


def reconstruct_bridges(
    problem: Problem, parameters: Parameters, spaces: Spaces, source: Source, *, residual_term: bool = True
) -> list[dict[str, Any]]:
    """Search all bridge blocks of a net.

    Args:
        problem: the net.
        parameters: incumbents, replaced by what is found.
        spaces: what may be chosen.
        source: where the gradients that weight the error come from.
        residual_term: see `BlockError`.

    Returns:
        One JSON-able entry per block: its modules, and the mean relative error of what it hands out, before and after.
    """
    blocks = find_bridges(problem.graph)
    found = []
    data = gather_blocks(problem, blocks, source)
    with task("Bridge blocks", len(blocks)) as advance:
        for block, clean in zip(blocks, data, strict=True):
            error = BlockError(problem, block, clean, residual_term=residual_term)
            before, after = BlockSearch(error, parameters, spaces).run()
            count = len(error.compared)
            found.append({"modules": list(block.modules), "before": before / count, "after": after / count})
            advance(1)
    return found
