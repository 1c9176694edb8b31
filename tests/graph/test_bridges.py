from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import qhyvit.models  # noqa: F401  registers Mobile-Former with timm
from qhyvit.cli import app
from qhyvit.errors import QhyvitError
from qhyvit.graph.bridges import BridgeBlock, find_bridges
from qhyvit.graph.capture import capture
from qhyvit.graph.ops import WEIGHTED, is_call
from qhyvit.graph.serialise import from_json, to_json
from qhyvit.store import save
from tiny import quantized


def v1(stage: int) -> tuple[str, ...]:
    return f"stages.{stage}.1.conv_1x1", f"stages.{stage}.1.transformer.0.attn.qkv"


def v2(stage: int) -> tuple[str, ...]:
    return f"stages.{stage}.1.conv_1x1", f"stages.{stage}.1.transformer.0.attn.qkv_proj"


def former(stage: str, *layers: str) -> tuple[str, ...]:
    return tuple(f"stages.{stage}.{layer}" for layer in layers)


def former_v2(local: int, local_last: int) -> list[tuple[str, ...]]:
    """EfficientFormerV2 with so many local blocks in its last two stages."""
    qkv = [f"token_mixer.{p}.conv" for p in "qkv"]
    return [
        (
            f"stages.2.blocks.{local - 1}.mlp.fc2.conv",
            *former(f"2.blocks.{local}", "token_mixer.stride_conv.conv", *qkv),
        ),
        (f"stages.3.blocks.{local_last - 1}.mlp.fc2.conv", *former(f"3.blocks.{local_last}", *qkv)),
    ]


# Input side and the modules of each bridge block; the relative positions of EfficientFormer fix its side.
FAMILIES: dict[str, tuple[int, list[tuple[str, ...]]]] = {
    "mobilevit_xxs": (64, [v1(2), v1(3), v1(4)]),
    "mobilevit_xs": (64, [v1(2), v1(3), v1(4)]),
    "mobilevit_s": (64, [v1(2), v1(3), v1(4)]),
    "mobilevitv2_050": (64, [v2(2), v2(3), v2(4)]),
    "mobilevitv2_100": (64, [v2(2), v2(3), v2(4)]),
    "mobilevitv2_200": (64, [v2(2), v2(3), v2(4)]),
    "efficientformer_l1": (
        224,
        [former("3", "blocks.2.mlp.fc1", "blocks.2.mlp.fc2", "blocks.4.token_mixer.qkv")],
    ),
    "efficientformer_l3": (
        224,
        [former("3", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "blocks.3.token_mixer.qkv")],
    ),
    "efficientformer_l7": (224, [former("3", "downsample.conv", "blocks.1.token_mixer.qkv")]),
    "efficientformerv2_s0": (64, former_v2(4, 2)),
    "efficientformerv2_s1": (64, former_v2(7, 4)),
    "efficientformerv2_s2": (64, former_v2(8, 4)),
    "efficientformerv2_l": (64, former_v2(9, 4)),
}
QUICK = ["mobilevit_xxs", "mobilevitv2_050", "efficientformer_l1", "efficientformerv2_s0"]


@cache
def graph_of(name: str, side: int) -> fx.GraphModule:
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, img_size=side)
    except TypeError:
        model = timm.create_model(name)
    return capture(model, torch.zeros(1, 3, side, side))


def net_of(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name)


def graph_of_module(module: nn.Module, side: int = 16) -> fx.GraphModule:
    return capture(module, torch.zeros(1, 3, side, side))


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)

    def values(self, pictures: Tensor) -> dict[str, Any]:
        self.run(pictures)
        return {node.name: value for node, value in self.env.items()}


def compute(node: fx.Node, known: dict[str, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n.name])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def check_blocks(graph: fx.GraphModule, blocks: tuple[BridgeBlock, ...], side: int) -> None:
    """Each block computes its outputs, to the bit, from its inputs and constants alone."""
    torch.manual_seed(1)
    with torch.no_grad():
        full = Recorder(graph).values(torch.randn(2, 3, side, side))
    nodes = {n.name: n for n in graph.graph.nodes}
    for block in blocks:
        known = {name: full[name] for name in block.inputs}
        known |= {n.name: full[n.name] for n in nodes.values() if n.op == "get_attr"}
        for name in block.nodes:
            known[name] = compute(nodes[name], known)
        for name in block.outputs:
            assert torch.equal(known[name], full[name])
        assert set(block.outputs) <= set(block.members) <= set(block.nodes)
        assert block.modules == tuple(nodes[m].meta["module"] for m in block.members)
        assert block.nodes[0] == block.members[0]
        assert nodes[block.members[0]].args[0].name == block.inputs[0]
        assert not any(nodes[name].op == "get_attr" for name in block.inputs)


def modules(blocks: tuple[BridgeBlock, ...]) -> list[tuple[str, ...]]:
    return [block.modules for block in blocks]


def bridges_of(module: nn.Module) -> list[tuple[str, ...]]:
    """Modules of the bridge blocks of a small net, each block checked."""
    graph = graph_of_module(module)
    blocks = find_bridges(graph)
    check_blocks(graph, blocks, 16)
    return modules(blocks)


# The paper's families ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_families_of_the_paper(name: str) -> None:
    side, expected = FAMILIES[name]
    graph = graph_of(name, side)
    before = str(graph.graph)
    blocks = find_bridges(graph)
    assert modules(blocks) == expected
    check_blocks(graph, blocks, side)
    layers = {n.name for n in graph.graph.nodes if is_call(n, WEIGHTED)}
    for block in blocks:  # no layer within a block that is not searched with it
        assert layers.intersection(block.nodes) == set(block.members)
        assert len(block.outputs) == (3 if "v2_s" in name or "v2_l" in name else 1)
    assert str(graph.graph) == before


def test_the_same_after_reading_the_graph_from_a_file() -> None:
    graph = graph_of("mobilevitv2_050", 64)
    again = from_json(json.loads(json.dumps(to_json(graph))), dict(graph.named_buffers()))
    assert find_bridges(again) == find_bridges(graph)


def test_a_residual_read_by_the_block_is_an_input() -> None:
    blocks = find_bridges(graph_of("efficientformerv2_s0", 64))
    assert blocks[0].inputs == ("stages_2_blocks_3_mlp_mid_bn_act_gelu", "stages_2_blocks_2_add")


# Models nobody listed ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "count"),
    [
        ("resnet18", 64, 0),
        ("poolformer_s12", 64, 0),  # mixes positions by pooling
        ("skresnet18", 64, 0),  # a softmax over branches
        ("deit_tiny_patch16_224", 64, 1),
        ("swin_tiny_patch4_window7_224", 224, 1),
        ("levit_128s", 224, 1),
        ("coatnet_0_224", 224, 1),
        ("efficientvit_b0", 64, 2),  # attention without softmax
        ("efficientvit_m0", 224, 3),  # one per stage, though each block has two feed-forward networks
        ("visformer_tiny", 224, 2),
        ("mobilenetv4_hybrid_medium", 128, 2),
        ("edgenext_xx_small", 64, 3),
        ("tiny_vit_5m_224", 224, 3),
        ("coat_lite_tiny", 64, 4),
        ("pvt_v2_b0", 64, 4),  # a strided convolution before each key and value is no hand-over
        ("nextvit_small", 64, 4),
    ],
)
def test_other_models(name: str, side: int, count: int) -> None:
    graph = graph_of(name, side)
    blocks = find_bridges(graph)
    assert len(blocks) == count
    check_blocks(graph, blocks, side)


# Small nets, one property each -------------------------------------------------------------------------------------


class Local(nn.Module):
    """A local block, or the feed-forward network of a transformer block: both look the same."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.contract = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.contract(F.gelu(self.depthwise(F.gelu(self.expand(x)))))
        return out


class Mixer(nn.Module):
    """Attention over the positions of a map; `mix` computes it from q, k, v (N, L, 8)."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).flatten(2).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(self.mix(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])) + x


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 3, 4, 1), nn.Sequential(*blocks), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def qkv(block: int) -> tuple[str, ...]:
    return tuple(f"blocks.{block}.{p}" for p in "qkv")


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([Local()], []),
        ([Mixer()], [("stem", *qkv(0))]),
        ([Mixer(), Mixer()], [("stem", *qkv(0))]),
        # one block of convolutions after an attention is its feed-forward network, a second one is a local block
        ([Local(), Mixer(), Local(), Mixer()], [("blocks.0.contract", *qkv(1))]),
        (
            [Local(), Mixer(), Local(), Local(), Mixer()],
            [("blocks.0.contract", *qkv(1)), ("blocks.3.contract", *qkv(4))],
        ),
    ],
    ids=["no attention", "no local block", "two attentions", "feed-forward", "local block"],
)
def test_only_local_blocks_lead_to_a_bridge(blocks: list[nn.Module], expected: list[tuple[str, ...]]) -> None:
    assert bridges_of(Net(*blocks)) == expected


def without_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(q) @ (F.relu(k).transpose(1, 2) @ v)


def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(q @ k.transpose(1, 2)).square() @ v


def factorised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.softmax(1).transpose(1, 2) @ v)


def context(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[..., :1].softmax(1) * k).sum(1, keepdim=True) * F.relu(v)


@pytest.mark.parametrize("mix", [without_softmax, squared_relu, factorised])
def test_kinds_of_attention(mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert bridges_of(Net(Mixer(mix))) == [("stem", *qkv(0))]


def test_a_value_that_is_not_mixed_needs_no_projection_in_the_block() -> None:
    assert bridges_of(Net(Mixer(context))) == [("stem", "blocks.0.q", "blocks.0.k")]


def test_gates_and_softmaxes_without_positions_are_no_attention() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.choose = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.stack([self.a(x), self.b(x)], 1)
            weights = self.choose(both.sum(1).mean((2, 3))).unflatten(1, (2, 8)).softmax(1)
            return (both * weights[..., None, None]).sum(1)

    assert bridges_of(Net(Branches(), nn.Softmax(1))) == []


def test_without_a_residual_the_last_convolution_and_the_projection() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x.flatten(2).transpose(1, 2))).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])

    assert bridges_of(Net(Local(), Bare())) == [("blocks.0.contract", "blocks.1.qkv")]


def test_attentions_over_the_same_convolution_share_a_block() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            both = [F.scaled_dot_product_attention(*p(tokens).chunk(3, -1)) for p in (self.a, self.b)]
            return x + self.out(torch.cat(both, -1)).transpose(1, 2).unflatten(2, x.shape[2:])

    assert bridges_of(Net(Twice())) == [("stem", "blocks.0.a", "blocks.0.b")]


def test_layers_between_a_convolution_and_the_projection_are_members() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.qkv = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.norm(self.embed(x.flatten(2).transpose(1, 2)))
            mixed = F.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, -1))
            return (tokens + mixed).transpose(1, 2).unflatten(2, x.shape[2:])

    assert bridges_of(Net(Embedded())) == [("stem", "blocks.0.embed", "blocks.0.qkv")]


# Two-way cross attention -------------------------------------------------------------------------------------------


class ToTokens(nn.Module):
    """Queries from tokens, key and value the map itself; a gate and a projection after the mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.gate, self.proj, self.norm = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 12), nn.LayerNorm(12)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        flat = x.flatten(2)
        mixed = (self.q(z) @ flat * 0.35).softmax(-1) @ flat.transpose(1, 2)
        out: Tensor = self.norm(z + self.proj(mixed * F.hardsigmoid(self.gate(z))))
        return out


class ToMap(nn.Module):
    """The map itself as query, key and value from tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        weights = (x.flatten(2).transpose(1, 2) @ self.k(z).transpose(1, 2) * 0.35).softmax(-1)
        return x + (weights @ self.v(z)).transpose(1, 2).unflatten(2, x.shape[2:])


class TwoWayBlock(nn.Module):
    """Map to tokens, attention among the tokens, convolutions gated by a token, tokens to map."""

    def __init__(self) -> None:
        super().__init__()
        self.to_tokens, self.to_map = ToTokens(), ToMap()
        self.q, self.fc1, self.fc2, self.norm = (
            nn.Linear(12, 12),
            nn.Linear(12, 24),
            nn.Linear(24, 12),
            nn.LayerNorm(12),
        )
        self.expand, self.gate, self.contract = nn.Conv2d(8, 16, 3, 1, 1), nn.Linear(12, 16), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = self.to_tokens(x, z)
        z = z + (self.q(z) @ z.transpose(1, 2)).softmax(-1) @ z
        z = self.norm(z + self.fc2(F.gelu(self.fc1(z))))
        y = self.expand(x)
        y = x + self.contract(torch.maximum(y, y * self.gate(z[:, 0])[:, :, None, None]))
        return self.to_map(y, z), z


class TwoWay(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(3, 12))
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 3, 4, 1), ToTokens(), nn.Linear(20, 5)
        self.blocks = nn.ModuleList(TwoWayBlock() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.stem(x), self.tokens.expand(x.shape[0], -1, -1)
        for block in self.blocks:
            x, z = block(x, z)
        z = self.last(x, z)
        out: Tensor = self.head(torch.cat([x.mean((2, 3)), z[:, 0]], 1))
        return out


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("mobile_former_26m", 8),
        pytest.param("mobile_former_96m", 8, marks=pytest.mark.slow),
        pytest.param("mobile_former_151m", 11, marks=pytest.mark.slow),
        pytest.param("mobile_former_508m", 11, marks=pytest.mark.slow),
    ],
)
def test_mobile_former(name: str, blocks: int) -> None:
    """Two hand-overs a block, of which the one from the stem and the one to the classifier are not counted: 15, 21."""
    graph = graph_of(name, 64)
    found = find_bridges(graph)
    assert len(found) == 2 * blocks - 1
    assert modules(found)[0] == ("features.1.global_local.k", "features.1.global_local.proj")
    for block in range(2, blocks + 1):
        to_tokens, to_map = modules(found)[2 * block - 3 : 2 * block - 1]
        last = "conv4.0" if hasattr(net_of(name).features[block - 1], "conv4") else "conv3.0"
        f = f"features.{block}"
        assert to_tokens == (f"features.{block - 1}.{last}", f"{f}.local_global.q", f"{f}.local_global.proj")
        assert to_map == (f"{f}.global_local.k", f"{f}.global_local.proj")
    check_blocks(graph, found, 64)
    assert len(find_bridges(graph, exclude_entry_exit=False)) == 2 * blocks + 1


def test_two_way_hand_overs() -> None:
    def to_map(block: int) -> tuple[str, ...]:
        return f"blocks.{block}.to_map.k", f"blocks.{block}.to_map.v"

    def to_tokens(block: int) -> tuple[str, ...]:
        return (
            f"blocks.{block - 1}.contract",
            f"blocks.{block}.to_tokens.q",
            f"blocks.{block}.to_tokens.proj",
        )

    graph = graph_of_module(TwoWay(2))
    blocks = find_bridges(graph, exclude_entry_exit=False)
    between = [to_map(0), to_tokens(1), to_map(1)]
    entry = ("stem", "blocks.0.to_tokens.proj")  # the query is a constant
    leaving = ("blocks.1.contract", "last.q", "last.proj")
    assert modules(blocks) == [entry, *between, leaving]
    check_blocks(graph, blocks, 16)
    assert modules(find_bridges(graph)) == between


# Command line ------------------------------------------------------------------------------------------------------

NETS = """
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.head = nn.Conv2d(3, 8, 3, 4, 1), nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))).mean(1))

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.Flatten(), nn.Linear(128, 5))
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "bridge_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "bridge_nets"


def inspect(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_inspect_prints_the_layers_of_each_block(nets: str) -> None:
    model = (f"{nets}:Net", "--input-size", "16")
    assert inspect("--bridges", *model).split() == ["bridge", "block", "1", "stem", "qkv"]
    block = {"members": ["stem_conv2d", "qkv_linear"], "modules": ["stem", "qkv"]}
    assert json.loads(inspect("--bridges", "--json", *model)) == {"bridges": [block]}


def test_inspect_of_a_model_without_bridges(nets: str) -> None:
    model = (f"{nets}:plain", "--input-size", "16")
    assert "no bridge blocks" in inspect("--bridges", *model)
    assert json.loads(inspect("--bridges", "--json", *model)) == {"bridges": []}


def test_inspect_reads_a_result(tmp_path: Path) -> None:
    folder = save(quantized(), tmp_path / "out")
    found = json.loads(inspect("--bridges", "--json", str(folder)))
    assert [block["modules"] for block in found["bridges"]] == [["depthwise", "qkv"]]


def test_inspect_wants_to_be_told_what() -> None:
    with pytest.raises(QhyvitError, match="--bridges"):
        inspect()
