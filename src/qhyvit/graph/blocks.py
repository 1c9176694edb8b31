"""Reconstruction units: a graph cut into pieces that are fitted one after the other (BRECQ, arXiv 2102.05426).

Found from the graph's structure alone, by these rules:

* The graph is cut wherever a single value is alive: all that comes later depends on what was earlier through it alone.
  A residual block so is one piece, since its input stays alive until it is added.
* A piece that holds residuals inside a longer skip (attention blocks between a map and its concatenation) is cut again
  at the values that are alive alone beside its input.
* Never between a value in parts and its parts. Pieces without a layer belong to the piece before them.
* What still has more than `LARGEST` layers, as nets of two streams have, is cut where fewest values are alive.
* Bridge blocks are units of their own; what is left of the pieces they touch comes before or after them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import accumulate

from torch import fx

from qhyvit.graph.attentions import find_attentions
from qhyvit.graph.bridges import find_bridges
from qhyvit.graph.flow import Flow
from qhyvit.graph.ops import LAYOUT, WEIGHTED, aten, is_call

LARGEST = 12


@dataclass(frozen=True)
class Unit:
    """Nodes that are fitted together.

    Attributes:
        nodes: names, in graph order; each node that computes is in exactly one unit.
        layers: names of the convolutions and linears among them.
        inputs: names of the values that they read from earlier units or that are the net's input.
        outputs: names of the values that later units or the net's output read.
        bridge: whether it is a bridge block.
    """

    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bridge: bool = False


def find_units(graph: fx.GraphModule) -> tuple[Unit, ...]:
    """The units of a captured graph, in an order in which they can be run.

    Args:
        graph: a captured graph after the normalising passes; it is not changed.
    """
    flow = Flow(graph)
    computing = [n for n in graph.graph.nodes if n.op == "call_function"]
    pieces = _divided(flow, _merged(_cut(flow, [n for n in computing if n in flow.inputs], frozenset())))
    by_name = {n.name: n for n in computing}
    parted: list[tuple[list[fx.Node], bool]] = [(piece, False) for piece in pieces]
    for block in find_bridges(graph):
        parted = _with_bridge(flow, parted, [by_name[name] for name in block.nodes])
    return _units(graph, parted)


def whole_transformers(graph: fx.GraphModule, units: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """The units with each attention and the feed-forward network behind it, a residual of its own, as one unit.

    Args:
        graph: whose units they are.
        units: as `find_units` gives them. Bridge blocks stay by themselves.
    """
    flow = Flow(graph)
    by_name = {n.name: n for n in flow.nodes}
    mixtures = {a.result for a in find_attentions(flow)}
    found: list[tuple[list[fx.Node], bool]] = []
    for unit in units:
        piece = [by_name[name] for name in unit.nodes if name in by_name]
        before, bridge = found[-1] if found else ([], True)
        entry = {n for node in piece for n in flow.inputs[node]} - set(piece)
        if (
            not (bridge or unit.bridge)
            and mixtures & set(before)
            and not mixtures & set(piece)
            and len(_layers(piece)) > 1
            and len(entry) == 1
            and entry <= set(before)
            and _residual(flow, piece, frozenset())
        ):
            found[-1] = (before + piece, False)
        else:
            found.append((piece, unit.bridge))
    return _units(graph, found)


def _units(graph: fx.GraphModule, parted: list[tuple[list[fx.Node], bool]]) -> tuple[Unit, ...]:
    """Units of pieces that together hold all that depends on the pictures; the rest goes beside what first reads it."""
    computing = [n for n in graph.graph.nodes if n.op == "call_function"]
    owner = {n: i for i, (piece, _) in enumerate(parted) for n in piece}
    for node in reversed([n for n in computing if n not in owner]):  # batch sizes and the like
        owner[node] = min((owner[u] for u in node.users if u in owner), default=len(parted) - 1)
    members: list[list[fx.Node]] = [[] for _ in parted]
    for node in computing:
        members[owner[node]].append(node)
    return tuple(_unit(piece, bridge) for piece, (_, bridge) in zip(members, parted, strict=True))


def _cut(flow: Flow, nodes: list[fx.Node], beside: frozenset[fx.Node]) -> list[list[fx.Node]]:
    """Cut a run of nodes wherever one value is alive, skips of those in `beside` apart; then what holds residuals."""
    pieces: list[list[fx.Node]] = [[]]
    for node, alive in zip(nodes, _alive(flow, nodes, beside), strict=True):
        pieces[-1].append(node)
        if alive <= 1 and not any(is_call(user, operator.getitem) for user in flow.users[node]):
            pieces.append([])
    found = []
    for piece in filter(None, pieces):
        entry = frozenset(n for node in piece for n in flow.inputs[node] if n not in set(piece)) | beside
        inner = _merged(_cut(flow, piece, entry)) if entry != beside and len(_layers(piece)) > 1 else []
        found += inner if len(inner) > 1 and any(_residual(flow, p, entry) for p in inner) else [piece]
    return found


def _alive(flow: Flow, nodes: list[fx.Node], beside: frozenset[fx.Node] = frozenset()) -> list[int]:
    """After each node of a run, how many values so far, those that the run reads included, something later reads.

    A value in `beside` skips the run: where it is read last, behind the run if it is read there, does not count.
    """
    index = {node: i for i, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 1)
    for source in dict.fromkeys([n for node in nodes for n in (*flow.inputs[node], node)]):
        read = sorted(index.get(user, len(nodes)) for user in flow.users[source]) or [len(nodes)]
        if source in beside:
            read = [i for i in read if i < read[-1]]
        begin, end = index.get(source, 0), max(read, default=0)
        if begin < end:
            changes[begin] += 1
            changes[end] -= 1
    return list(accumulate(changes[:-1]))


def _residual(flow: Flow, piece: list[fx.Node], beside: frozenset[fx.Node]) -> bool:
    """Whether a piece with layers adds its own input to what it computes, and that is not where a skip ends."""
    inside = set(piece)
    for node in piece:
        if is_call(node, aten.add.Tensor) and len(flow.inputs[node]) > 1 and _layers(piece):
            for operand in flow.inputs[node]:
                while operand in inside and is_call(operand, LAYOUT):
                    operand = flow.inputs[operand][0]
                later = any(flow.position[user] > flow.position[node] for user in flow.users[operand])
                if operand not in inside and (operand not in beside or later):
                    return True
    return False


def _layers(piece: list[fx.Node]) -> list[fx.Node]:
    return [n for n in piece if is_call(n, WEIGHTED)]


def _merged(pieces: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Pieces without layers join the one before, the first ones the one behind."""
    found: list[list[fx.Node]] = []
    for piece in pieces:
        if found and (not _layers(piece) or not _layers(found[-1])):
            found[-1] = found[-1] + piece
        else:
            found.append(piece)
    return found


def _divided(flow: Flow, pieces: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Pieces of at most `LARGEST` layers, cut in their second half where fewest values are alive."""
    found = []
    for piece in pieces:
        while len(_layers(piece)) > LARGEST:
            alive, seen, best = _alive(flow, piece), 0, (len(piece), 0)
            for i, node in enumerate(piece[:-1]):
                seen += is_call(node, WEIGHTED)
                if LARGEST // 2 <= seen <= LARGEST:
                    best = min(best, (alive[i], -i))
            found.append(piece[: 1 - best[1]])
            piece = piece[1 - best[1] :]
        found.append(piece)
    return found


def _with_bridge(
    flow: Flow, pieces: list[tuple[list[fx.Node], bool]], block: list[fx.Node]
) -> list[tuple[list[fx.Node], bool]]:
    """Take a bridge block out of the pieces it touches; what depends on it comes after, the rest of them before."""
    inside = {n for n in block if not any(n in piece for piece, bridge in pieces if bridge)}
    touched = [i for i, (piece, bridge) in enumerate(pieces) if not bridge and inside & set(piece)]
    if not touched or any(bridge for _, bridge in pieces[touched[0] : touched[-1] + 1]):
        return pieces  # tangled with another bridge block: its layers stay with their piece
    before, after = [], []
    for piece, _ in pieces[touched[0] : touched[-1] + 1]:
        behind = [n for n in piece if n not in inside and any(flow.ancestor(b, of=n) for b in inside)]
        ahead = [n for n in piece if n not in inside and n not in set(behind)]
        before += [(ahead, False)] if ahead else []
        after += [(behind, False)] if behind else []
    middle = [(sorted(inside, key=flow.position.__getitem__), True)]
    return pieces[: touched[0]] + before + middle + after + pieces[touched[-1] + 1 :]


def _unit(piece: list[fx.Node], bridge: bool) -> Unit:
    inside = set(piece)
    read = dict.fromkeys(
        n.name for node in piece for n in node.all_input_nodes if n.op != "get_attr" and n not in inside
    )
    outputs = [n.name for n in piece if any(user not in inside for user in n.users)]
    return Unit(
        tuple(n.name for n in piece), tuple(n.name for n in _layers(piece)), tuple(read), tuple(outputs), bridge
    )
