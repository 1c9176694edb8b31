"""Mobile-Former against its published figures, its published parameter names, and a second implementation."""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qhyvit.models import load_model
from qhyvit.models.cost import multiply_adds
from qhyvit.models.mobile_former import MobileFormer

# Parameters by part (dynamic ReLU, Former, Mobile->Former, Former->Mobile, head, the rest), Conv and Linear modules,
# and multiply-adds at 224×224 in millions (convolutions, linear layers, attention), as published or measured with the
# public code.
FIGURES = {
    "26m": ((303_648, 795_648, 167_120, 106_296, 1_763_944, 96_132), 140, (16.709, 5.205, 1.637)),
    "52m": ((303_648, 795_648, 167_120, 106_296, 1_805_416, 290_964), 140, (42.449, 5.205, 1.637)),
    "96m": ((386_544, 795_648, 221_160, 142_416, 2_531_560, 507_924), 141, (80.916, 7.380, 3.721)),
    "151m": ((943_120, 2_452_032, 467_000, 302_624, 2_613_480, 817_572), 189, (116.205, 22.591, 7.453)),
    "214m": ((1_137_552, 2_452_032, 582_600, 379_824, 3_604_520, 1_269_392), 189, (174.661, 24.868, 8.845)),
    "294m": ((1_318_656, 2_452_032, 691_264, 450_848, 4_730_728, 1_779_120), 189, (248.791, 27.176, 10.764)),
    "508m": ((1_663_616, 2_452_032, 917_840, 599_072, 5_408_680, 2_935_736), 189, (451.959, 30.307, 16.202)),
}
TOTALS = {
    "26m": 3_232_788,
    "52m": 3_469_092,
    "96m": 4_585_252,
    "151m": 7_595_828,
    "214m": 9_425_920,
    "294m": 11_422_648,
    "508m": 13_976_976,
}
PARTS = (".hyper", "global_block", "local_global", "global_local", "classifier.")
SLOW = pytest.mark.slow


@cache
def on_meta(variant: str) -> nn.Module:
    with torch.device("meta"):
        net: nn.Module = timm.create_model(f"mobile_former_{variant}")
    return net


@pytest.mark.parametrize("variant", FIGURES)
def test_parameters(variant: str) -> None:
    net = on_meta(variant)
    parts = dict.fromkeys((*PARTS, "rest"), 0)
    for name, parameter in net.named_parameters():
        parts[next((p for p in PARTS if p in name), "rest")] += parameter.numel()
    expected, layers, _ = FIGURES[variant]
    assert tuple(parts.values()) == expected
    assert sum(parts.values()) == TOTALS[variant]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules()) == layers


@pytest.mark.parametrize("variant", [v if v in ("26m", "96m") else pytest.param(v, marks=SLOW) for v in FIGURES])
def test_multiply_adds(variant: str) -> None:
    assert multiply_adds(on_meta(variant), (3, 224, 224)) / 1e6 == pytest.approx(sum(FIGURES[variant][2]), abs=0.002)


# A second implementation, from the same description but with nothing in common: tables by input and output channels,
# parameters by their published names, one picture at a time, attention by loops over the heads. ----------------------

# kind, input channels, hidden channels, output channels
TABLES: dict[str, dict[str, Any]] = {
    "26m": {
        "stem": 8,
        "tokens": (3, 128),
        "groups": 4,
        "stride": 2,
        "head": (96, 576, 704, 1024),
        "blocks": [
            ("L", 8, 24, 12),
            ("B", 12, 36, 12),
            ("D", 12, 72, 24),
            ("B", 24, 72, 24),
            ("D", 24, 144, 48),
            ("B", 48, 192, 48),
            ("B", 48, 288, 64),
            ("D", 64, 384, 96),
            ("B", 96, 576, 96),
        ],
    },
    "96m": {
        "stem": 12,
        "tokens": (4, 128),
        "groups": 1,
        "stride": 1,
        "head": (128, 768, 896, 1280),
        "blocks": [
            ("L", 12, 24, 12),
            ("D", 12, 72, 16),
            ("D", 16, 96, 32),
            ("B", 32, 96, 32),
            ("D", 32, 192, 64),
            ("B", 64, 256, 64),
            ("B", 64, 384, 88),
            ("D", 88, 528, 128),
            ("B", 128, 768, 128),
        ],
    },
    "294m": {
        "stem": 16,
        "tokens": (6, 192),
        "groups": 1,
        "stride": 1,
        "head": (192, 1152, 1344, 1920),
        "blocks": [
            ("L", 16, 32, 16),
            ("D", 16, 96, 24),
            ("B", 24, 96, 24),
            ("D", 24, 144, 48),
            ("B", 48, 192, 48),
            ("D", 48, 288, 96),
            ("B", 96, 384, 96),
            ("B", 96, 576, 128),
            ("B", 128, 768, 128),
            ("D", 128, 768, 192),
            ("B", 192, 1152, 192),
            ("B", 192, 1152, 192),
        ],
    },
}


class Reference:
    """The forward pass of one variant in evaluation, on a state dict."""

    def __init__(self, variant: str, state: dict[str, Tensor]) -> None:
        self.table, self.state = TABLES[variant], state

    def conv(self, x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        """Convolution and BatchNorm; how many groups follows from the weight."""
        s, weight = self.state, self.state[f"{conv}.weight"]
        y = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, x.shape[1] // weight.shape[1])
        mean, std = s[f"{norm}.running_mean"], (s[f"{norm}.running_var"] + 1e-5).sqrt()
        factor = s[f"{norm}.weight"] / std
        return y * factor[:, None, None] + (s[f"{norm}.bias"] - mean * factor)[:, None, None]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def shuffle(self, x: Tensor, groups: int) -> Tensor:
        if self.table["groups"] == 1:
            return x
        each = x.shape[1] // groups
        return x[:, [g * each + i for i in range(each) for g in range(groups)]]

    def hard(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """(L, C), (M, C), (M, C) -> (L, C)."""
        each = q.shape[1] // heads
        out = []
        for h in range(heads):
            part = slice(h * each, (h + 1) * each)
            scores = q[:, part] @ k[:, part].T / math.sqrt(each)
            weights = (scores - scores.amax(1, keepdim=True)).exp()
            out.append(weights / weights.sum(1, keepdim=True) @ v[:, part])
        return torch.cat(out, 1)

    def dynamic(self, x: Tensor, z: Tensor, name: str) -> Tensor:
        h = self.hard(self.linear(self.linear(z[0], f"{name}.hyper.0").clamp(min=0), f"{name}.hyper.2"))
        c = x.shape[1]
        first, second = 1 + 2 * (h[:c] - 0.5), 2 * (h[c:] - 0.5)
        first, second = first * x.movedim(1, -1), second * x.movedim(1, -1)
        return torch.where(first > second, first, second).movedim(-1, 1)

    def to_tokens(self, x: Tensor, z: Tensor, name: str) -> Tensor:
        positions = x[0].flatten(1).T
        mixed = self.attention(self.linear(z, f"{name}.q"), positions, positions, 2)
        mixed = mixed * 2 * self.hard(self.linear(z, f"{name}.alpha.0"))
        return self.norm(z + self.linear(mixed, f"{name}.proj"), f"{name}.layer_norm")

    def former(self, z: Tensor, name: str) -> Tensor:
        mixed = self.linear(self.attention(self.linear(z, f"{name}.q"), z, z, 4), f"{name}.channel_mlp")
        z = self.norm(z + mixed, f"{name}.layer_norm")
        hidden = self.linear(z, f"{name}.ffn.0")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return self.norm(z + self.linear(hidden, f"{name}.ffn.2"), f"{name}.ffn_norm")

    def to_map(self, y: Tensor, z: Tensor, name: str) -> Tensor:
        mixed = self.attention(y[0].flatten(1).T, self.linear(z, f"{name}.k"), self.linear(z, f"{name}.proj"), 2)
        return y + mixed.T.reshape(y.shape)

    def block(self, kind: str, inputs: int, outputs: int, name: str, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "L":
            stride, conv = self.table["stride"], f"{name}.conv"
            y = self.shuffle(self.conv(x, f"{conv}.0", f"{conv}.1", stride).clamp(0, 6), inputs)
            y = self.conv(y, f"{conv}.4", f"{conv}.5")
            return (x + y if stride == 1 and inputs == outputs else y), z
        z = self.former(self.to_tokens(x, z, f"{name}.local_global"), f"{name}.global_block")
        if kind == "D":
            y = self.shuffle(self.conv(x, f"{name}.conv1.0", f"{name}.conv1.1", 2), inputs)
            u = self.conv(self.dynamic(y, z, f"{name}.hyper1"), f"{name}.conv2.0", f"{name}.conv2.1")
            y = self.shuffle(self.conv(u, f"{name}.conv3.0", f"{name}.conv3.1"), outputs)
            y = u + self.conv(self.dynamic(y, z, f"{name}.hyper3"), f"{name}.conv4.0", f"{name}.conv4.1")
        else:
            y = self.shuffle(self.conv(x, f"{name}.conv1.0", f"{name}.conv1.1"), 4)
            y = self.conv(self.dynamic(y, z, f"{name}.hyper1"), f"{name}.conv2.0", f"{name}.conv2.1")
            y = self.conv(self.dynamic(y, z, f"{name}.hyper2"), f"{name}.conv3.0", f"{name}.conv3.1")
            y = self.shuffle(y, 4)
            y = x + y if inputs == outputs else y
        return self.to_map(y, z, f"{name}.global_local"), z

    def logits(self, picture: Tensor) -> Tensor:
        """Logits (classes,) of a picture (3, H, W)."""
        x, z = self.conv(picture[None], "stem.0", "stem.1", 2).clamp(0, 6), self.state["tokens.weight"]
        for i, (kind, inputs, _, outputs) in enumerate(self.table["blocks"]):
            x, z = self.block(kind, inputs, outputs, f"features.{i}", x, z)
        z = self.to_tokens(x, z, "local_global")
        x = self.conv(self.shuffle(x, 4), "classifier.conv.1", "classifier.conv.2").clamp(0, 6)
        pooled = x[0].flatten(1).mean(1)
        both = torch.cat([pooled * self.hard(pooled), z[0]])
        hidden = self.linear(both, "classifier.fc.0")
        bn = {k: self.state[f"classifier.fc.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
        hidden = (hidden - bn["running_mean"]) / (bn["running_var"] + 1e-5).sqrt() * bn["weight"] + bn["bias"]
        return self.linear(hidden * self.hard(hidden), "classifier.classifier.1")


def lively(variant: str, side: int = 64) -> nn.Module:
    """A net whose parts all matter: an untrained one gives nearly the same logits for every picture."""
    torch.manual_seed(1)
    net: nn.Module = timm.create_model(f"mobile_former_{variant}", num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / math.sqrt(module.in_features))
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        for _ in range(8):
            net.train()(torch.randn(8, 3, side, side))
    return net.eval()


@pytest.mark.parametrize("variant", ["26m", "96m", pytest.param("294m", marks=SLOW)])
def test_against_a_second_implementation(variant: str) -> None:
    net = lively(variant).double()
    x = torch.randn(3, 3, 64, 96, dtype=torch.float64) * 3  # bright enough for the limit of ReLU6
    with torch.no_grad():
        assert float(net.stem[:2](x).max()) > 12
        found = net(x)
        reference = Reference(variant, net.state_dict())
        expected = torch.stack([reference.logits(picture) for picture in x])
    assert float(expected.std(0).mean()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# Published weights ------------------------------------------------------------------------------------------------


def published_state(variant: str, classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published state dict, written down from its description."""
    table = TABLES[variant]
    (tokens, d), groups = table["tokens"], table["groups"]
    shapes: dict[str, tuple[int, ...]] = {"tokens.weight": (tokens, d)}

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{k}": (width,) for k in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    def conv(name: str, bn: str, outputs: int, inputs: int, kernel: int = 1) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        norm(bn, outputs)

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def layer_norm(name: str) -> None:
        shapes.update({f"{name}.weight": (d,), f"{name}.bias": (d,)})

    def to_tokens(name: str, width: int) -> None:
        linear(f"{name}.q", width, d)
        linear(f"{name}.alpha.0", width, d)
        linear(f"{name}.proj", d, width)
        layer_norm(f"{name}.layer_norm")

    def hyper(name: str, width: int) -> None:
        linear(f"{name}.hyper.0", d // 4, d)
        linear(f"{name}.hyper.2", 2 * width, d // 4)

    conv("stem.0", "stem.1", table["stem"], 3, 3)
    for i, (kind, inputs, hidden, outputs) in enumerate(table["blocks"]):
        b = f"features.{i}"
        if kind == "L":
            conv(f"{b}.conv.0", f"{b}.conv.1", hidden, 1, 3)
            conv(f"{b}.conv.4", f"{b}.conv.5", outputs, hidden // groups)
            continue
        if kind == "D":
            conv(f"{b}.conv1.0", f"{b}.conv1.1", hidden, 1, 3)
            hyper(f"{b}.hyper1", hidden)
            conv(f"{b}.conv2.0", f"{b}.conv2.1", outputs, hidden // groups)
            conv(f"{b}.conv3.0", f"{b}.conv3.1", 4 * outputs, 1, 3)
            hyper(f"{b}.hyper3", 4 * outputs)
            conv(f"{b}.conv4.0", f"{b}.conv4.1", outputs, 4 * outputs // groups)
        else:
            conv(f"{b}.conv1.0", f"{b}.conv1.1", hidden, inputs // groups)
            hyper(f"{b}.hyper1", hidden)
            conv(f"{b}.conv2.0", f"{b}.conv2.1", hidden, 1, 3)
            hyper(f"{b}.hyper2", hidden)
            conv(f"{b}.conv3.0", f"{b}.conv3.1", outputs, hidden // groups)
        to_tokens(f"{b}.local_global", inputs)
        for name, wide, narrow in (("q", d, d), ("channel_mlp", d, d), ("ffn.0", 2 * d, d), ("ffn.2", d, 2 * d)):
            linear(f"{b}.global_block.{name}", wide, narrow)
        layer_norm(f"{b}.global_block.layer_norm")
        layer_norm(f"{b}.global_block.ffn_norm")
        linear(f"{b}.global_local.k", outputs, d)
        linear(f"{b}.global_local.proj", outputs, d)
    last, wide, both, hidden = table["head"]
    to_tokens("local_global", last)
    conv("classifier.conv.1", "classifier.conv.2", wide, last // groups)
    linear("classifier.fc.0", hidden, both)
    norm("classifier.fc.1", hidden)
    linear("classifier.classifier.1", classes, hidden)
    return shapes


@pytest.mark.parametrize("variant", TABLES)
def test_names_and_shapes_of_the_published_weights(variant: str) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in on_meta(variant).state_dict().items()}
    assert found == published_state(variant)


def test_a_published_checkpoint_loads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        f"module.{name}": torch.rand(shape, generator=generator) if shape else torch.tensor(1)
        for name, shape in published_state("26m", classes=20).items()
    }
    path = tmp_path / "mobile-former-26m.pth.tar"
    torch.save({"epoch": 450, "arch": "mobile", "state_dict": state, "args": argparse.Namespace(lr=8e-4)}, path)
    loaded = load_model("mobile_former_26m", weights=path)
    assert loaded.num_classes == 20
    assert loaded.trained
    own = loaded.module.state_dict()
    assert all(torch.equal(own[name.removeprefix("module.")], tensor) for name, tensor in state.items())


# As a timm net ----------------------------------------------------------------------------------------------------


def test_preprocessing_as_published() -> None:
    config = load_model("mobile_former_26m").preprocessing_config
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == ((3, 224, 224), "bilinear", 0.875)
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_features_and_head() -> None:
    net = timm.create_model("mobile_former_26m", num_classes=10, in_chans=1).eval()
    x = torch.randn(2, 1, 65, 97)
    with torch.no_grad():
        features = net.forward_features(x)
        assert [tuple(f.shape) for f in features] == [(2, net.num_features, 3, 4), (2, 3, 128)]
        hidden = net.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, net.head_hidden_size)
        torch.testing.assert_close(net.get_classifier()(hidden), net(x))
        torch.testing.assert_close(net.forward_head(features), net(x))
        net.reset_classifier(0)
        assert torch.equal(net(x), hidden)
        net.reset_classifier(4)
    assert net(x).shape == (2, 4)
    assert net.num_classes == 4
    with pytest.raises(ValueError, match="max"):
        net.reset_classifier(4, "max")


def test_regularisation_only_in_training() -> None:
    torch.manual_seed(0)
    net = timm.create_model("mobile_former_26m", num_classes=10, drop_rate=0.5, drop_path_rate=0.5)
    torch.nn.init.normal_(net.get_classifier().weight)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = 0.0
        assert not torch.allclose(net.train()(x), net(x))
        assert torch.equal(net.eval()(x), net(x))
    assert net.classifier.classifier[0].p == 0.5
    rates = [block.global_local.drop_path.drop_prob for block in net.features if hasattr(block, "global_local")]
    assert rates == sorted(rates)
    assert rates[-1] == 0.5


def test_every_parameter_is_trained() -> None:
    net = timm.create_model("mobile_former_26m", num_classes=10).train()
    assert isinstance(net, MobileFormer)
    net(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
