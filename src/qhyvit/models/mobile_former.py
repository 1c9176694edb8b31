"""Mobile-Former (Chen et al., CVPR 2022, arXiv 2108.05895), registered with timm as `mobile_former_26m` to `_508m`.

A convolutional path x (N, C, H, W) and a few tokens z (N, T, d) run side by side and look at each other in every block.
Structure and parameter names are those of the published weights, which therefore load without renaming. Where the paper
and the code that carries the weights differ (the gate of Mobile->Former, no key and value projections in Former, head
counts 2/4/2, hard sigmoid in the dynamic ReLU, the head's activation on the pooled vector), this follows the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

_HEADS, _FORMER_HEADS = 2, 4


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    """Convolution without bias and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)


def _shuffle(groups: int, grouped: bool) -> nn.Module:
    return nn.ChannelShuffle(groups) if grouped else nn.Identity()


def _heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, C) -> (N, heads, L, C / heads)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of (N, L, C) to (N, M, C); heads are contiguous parts of the channels. Gives (N, L, C)."""
    mixed = F.scaled_dot_product_attention(_heads(query, heads), _heads(key, heads), _heads(value, heads))
    return mixed.transpose(1, 2).flatten(2)


class DynamicReLU(nn.Module):
    """max(a1 x, a2 x), slopes per picture and channel from the first token: a1 in [0, 2], a2 in [-1, 1]."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(dim, dim // 4), nn.ReLU(), nn.Linear(dim // 4, 2 * channels))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        first, second = (2 * F.hardsigmoid(self.hyper(z[:, 0])))[:, :, None, None].chunk(2, 1)
        return torch.maximum(first * x, (second - 1) * x)


class MobileToFormer(nn.Module):
    """Tokens look at the map: key and value are x itself, the mixture is gated by the tokens."""

    def __init__(self, dim: int, channels: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.q = nn.Linear(dim, channels)
        self.alpha = nn.Sequential(nn.Linear(dim, channels), nn.Hardsigmoid())
        self.proj = nn.Linear(channels, dim)
        self.layer_norm = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        positions = x.flatten(2).transpose(1, 2)
        mixed = _attend(self.q(z), positions, positions, _HEADS) * (2 * self.alpha(z))
        out: Tensor = self.layer_norm(z + self.drop_path(self.proj(mixed)))
        return out


class Former(nn.Module):
    """Tokens look at each other, then a feed-forward network; norms after the residuals."""

    def __init__(self, dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.q, self.channel_mlp = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layer_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, z: Tensor) -> Tensor:
        mixed = self.channel_mlp(_attend(self.q(z), z, z, _FORMER_HEADS))
        z = self.layer_norm(z + self.drop_path(mixed))
        out: Tensor = self.ffn_norm(z + self.ffn(z))
        return out


class FormerToMobile(nn.Module):
    """The map looks at the tokens: the query is x itself, keys and values (`proj`) come from the tokens."""

    def __init__(self, dim: int, channels: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.k, self.proj = nn.Linear(dim, channels), nn.Linear(dim, channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        mixed = _attend(x.flatten(2).transpose(1, 2), self.k(z), self.proj(z), _HEADS)
        out: Tensor = x + self.drop_path(mixed.transpose(1, 2).reshape(x.shape))
        return out


class LiteBottleneck(nn.Module):
    """Depthwise expansion, ReLU6, contraction; the tokens pass untouched."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, groups: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.conv = nn.Sequential(
            *_conv(inputs, hidden, 3, stride, inputs),
            nn.ReLU6(),
            _shuffle(inputs, groups > 1),
            *_conv(hidden, outputs, groups=groups),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return (x + y if self.residual else y), z


class _Block(nn.Module):
    """Tokens look at the map and at each other, the map is convolved under their control, then looks at them."""

    def __init__(self, inputs: int, outputs: int, dim: int, drop_path: float) -> None:
        super().__init__()
        self.local_global = MobileToFormer(dim, inputs, drop_path)
        self.global_block = Former(dim, drop_path)
        self.global_local = FormerToMobile(dim, outputs, drop_path)
        self.drop_path = DropPath(drop_path)

    def mobile(self, x: Tensor, z: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = self.global_block(self.local_global(x, z))
        return self.global_local(self.mobile(x, z), z), z


class DownBlock(_Block):
    """Two lite bottlenecks, the first with stride 2; the residual is around the second alone."""

    def __init__(self, inputs: int, outputs: int, expansion: int, dim: int, groups: int, drop_path: float) -> None:
        super().__init__(inputs, outputs, dim, drop_path)
        first, second, grouped = expansion * inputs, 4 * outputs, groups > 1
        self.conv1 = nn.Sequential(*_conv(inputs, first, 3, 2, inputs), _shuffle(inputs, grouped))
        self.hyper1 = DynamicReLU(dim, first)
        self.conv2 = nn.Sequential(*_conv(first, outputs, groups=groups))
        self.conv3 = nn.Sequential(*_conv(outputs, second, 3, 1, outputs), _shuffle(outputs, grouped))
        self.hyper3 = DynamicReLU(dim, second)
        self.conv4 = nn.Sequential(*_conv(second, outputs, groups=groups))

    def mobile(self, x: Tensor, z: Tensor) -> Tensor:
        x = self.conv2(self.hyper1(self.conv1(x), z))
        out: Tensor = x + self.drop_path(self.conv4(self.hyper3(self.conv3(x), z)))
        return out


class Block(_Block):
    """Inverted residual."""

    def __init__(self, inputs: int, outputs: int, expansion: int, dim: int, groups: int, drop_path: float) -> None:
        super().__init__(inputs, outputs, dim, drop_path)
        hidden, grouped = expansion * inputs, groups > 1
        self.conv1 = nn.Sequential(*_conv(inputs, hidden, groups=groups), _shuffle(groups, grouped))
        self.hyper1 = DynamicReLU(dim, hidden)
        self.conv2 = nn.Sequential(*_conv(hidden, hidden, 3, 1, hidden))
        self.hyper2 = DynamicReLU(dim, hidden)
        self.conv3 = nn.Sequential(*_conv(hidden, outputs, groups=groups), _shuffle(groups, grouped))
        self.residual = inputs == outputs

    def mobile(self, x: Tensor, z: Tensor) -> Tensor:
        y: Tensor = self.conv3(self.hyper2(self.conv2(self.hyper1(self.conv1(x), z)), z))
        return x + self.drop_path(y) if self.residual else y


class Head(nn.Module):
    """Pooled map and first token, one hidden layer, the classifier."""

    def __init__(self, channels: int, dim: int, hidden: int, num_classes: int, groups: int, drop_rate: float) -> None:
        super().__init__()
        wide = 6 * channels
        self.conv = nn.Sequential(_shuffle(groups, groups > 1), *_conv(channels, wide, groups=groups), nn.ReLU6())
        self.fc = nn.Sequential(nn.Linear(wide + dim, hidden), nn.BatchNorm1d(hidden), nn.Hardswish())
        last = nn.Linear(hidden, num_classes) if num_classes > 0 else nn.Identity()
        self.classifier = nn.Sequential(nn.Dropout(drop_rate), last)

    def forward(self, x: Tensor, z: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = F.hardswish(self.conv(x).mean((2, 3)))
        hidden: Tensor = self.fc(torch.cat([pooled, z[:, 0]], 1))
        return hidden if pre_logits else self.classifier(hidden)


@dataclass(frozen=True)
class Sizes:
    """Numbers of one variant; `blocks` are kind (L lite, D down, B plain), expansion, output channels."""

    stem: int
    tokens: int
    dim: int
    hidden: int
    blocks: str
    groups: int = 1
    lite_stride: int = 1


_SMALLEST = "L3-12 B3-12 D6-24 B3-24 D6-48 B4-48 B6-64 D6-96 B6-96"
_VARIANTS = {
    "26m": Sizes(8, 3, 128, 1024, _SMALLEST, groups=4, lite_stride=2),
    "52m": Sizes(8, 3, 128, 1024, _SMALLEST, lite_stride=2),
    "96m": Sizes(12, 4, 128, 1280, "L2-12 D6-16 D6-32 B3-32 D6-64 B4-64 B6-88 D6-128 B6-128"),
    "151m": Sizes(12, 6, 192, 1280, "L2-12 D6-16 B3-16 D6-32 B3-32 D6-64 B4-64 B6-88 B6-88 D6-128 B6-128 B6-128"),
    "214m": Sizes(12, 6, 192, 1600, "L2-12 D6-20 B3-20 D6-40 B4-40 D6-80 B4-80 B6-112 B6-112 D6-160 B6-160 B6-160"),
    "294m": Sizes(16, 6, 192, 1920, "L2-16 D6-24 B4-24 D6-48 B4-48 D6-96 B4-96 B6-128 B6-128 D6-192 B6-192 B6-192"),
    "508m": Sizes(24, 6, 192, 1920, "L2-24 D6-40 B3-40 D6-72 B3-72 D6-128 B4-128 B6-176 B6-176 D6-240 B6-240 B6-240"),
}


class MobileFormer(nn.Module):
    """Mobile-Former; pictures (N, in_chans, H, W) of any size, logits (N, num_classes).

    Args:
        sizes: numbers of the variant.
        num_classes: 0 leaves the classifier out; the net then gives (N, head_hidden_size).
        in_chans: channels of the pictures.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from the first.
    """

    def __init__(
        self,
        sizes: Sizes,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dim, groups, channels = sizes.dim, sizes.groups, sizes.stem
        self.num_classes = num_classes
        self.head_hidden_size = sizes.hidden
        self.tokens = nn.Embedding(sizes.tokens, dim)
        self.stem = nn.Sequential(*_conv(in_chans, channels, 3, 2), nn.ReLU6())
        rows = sizes.blocks.split()
        features: list[nn.Module] = []
        for i, row in enumerate(rows):
            kind, (expansion, outputs) = row[0], map(int, row[1:].split("-"))
            drop_path = drop_path_rate * i / (len(rows) - 1)
            if kind == "L":
                features.append(LiteBottleneck(channels, outputs, expansion, sizes.lite_stride, groups))
            else:
                block = DownBlock if kind == "D" else Block
                features.append(block(channels, outputs, expansion, dim, groups, drop_path))
            channels = outputs
        self.features = nn.ModuleList(features)
        self.local_global = MobileToFormer(dim, channels, drop_path_rate)
        self.num_features = channels
        self.classifier = Head(channels, dim, sizes.hidden, num_classes, groups, drop_rate)
        self.apply(_initialise)

    def get_classifier(self) -> nn.Module:
        return self.classifier.classifier[1]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer for `num_classes`; 0 for none. There is no other pooling than the mean."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"Mobile-Former pools by the mean, not by {global_pool!r}.")
        old = next(self.classifier.parameters())
        self.num_classes = num_classes
        last = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()
        _initialise(last)
        self.classifier.classifier[1] = last.to(old.device, old.dtype)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map (N, num_features, H / 32, W / 32) and the tokens (N, T, d) that the head takes."""
        z = self.tokens.weight.expand(x.shape[0], -1, -1)
        x = self.stem(x)
        for block in self.features:
            x, z = block(x, z)
        return x, self.local_global(x, z)

    def forward_head(self, features: tuple[Tensor, Tensor], pre_logits: bool = False) -> Tensor:
        """Logits, or with `pre_logits` what the last layer reads (N, head_hidden_size)."""
        out: Tensor = self.classifier(*features, pre_logits=pre_logits)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _initialise(module: nn.Module) -> None:
    """Convolutions by fan-out (of a full kernel, grouped or not), linear layers N(0, 0.01), biases 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {
        f"mobile_former_{name}": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.0",
            "classifier": "classifier.classifier.1",
        }
        for name in _VARIANTS
    }
)


def _entry_point(variant: str) -> Callable[..., MobileFormer]:
    def build(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
        net: MobileFormer = build_model_with_cfg(
            MobileFormer, f"mobile_former_{variant}", pretrained, sizes=_VARIANTS[variant], **kwargs
        )
        return net

    build.__name__ = f"mobile_former_{variant}"
    return build


for _variant in _VARIANTS:
    globals()[f"mobile_former_{_variant}"] = register_model(_entry_point(_variant))
