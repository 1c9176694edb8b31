"""Every operator's ONNX form gives in ONNX Runtime what torch gives, with another number of pictures than captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qhyvit.errors import TargetError
from qhyvit.graph.capture import capture
from qhyvit.graph.ops import weight_of
from qhyvit.graph.sites import Sites, place
from qhyvit.quantized import Parameters, QuantizedModel
from qhyvit.quantizers.uniform import uniform_from_range
from qhyvit.recipe import Recipe
from qhyvit.targets import TARGETS
from qhyvit.targets.onnx_ops import LOWERINGS

ORT = TARGETS["onnxruntime"]
KERNEL, MATRIX = torch.randn(6, 3, 3, 3), torch.randn(5, 3)


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def pictures(count: int, size: tuple[int, ...] = (3, 8, 8)) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(count))


def module(kind: type[nn.Module], *args: object, **options: object) -> nn.Module:
    """A layer with random parameters of its own, the same ones each time."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        layer = kind(*args, **options)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return layer


def float_model(graph: fx.GraphModule) -> QuantizedModel:
    return QuantizedModel(graph, Sites((), ()), Parameters(), Recipe(), {})


class Ranges(fx.Interpreter):
    """The extremes of every value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n.name] = (result.min(), result.max())
        return result


def quantized_model(graph: fx.GraphModule, x: Tensor) -> QuantizedModel:
    """All values and weights in 8 bits over their extremes."""
    sites = place(graph, scope="full", quantized_outputs=ORT.quantized_outputs)
    ranges = Ranges(graph)
    with torch.no_grad():
        ranges.run(x)
    parameters, nodes = Parameters(), {n.name: n for n in graph.graph.nodes}
    for site in sites.activations:
        low, high = ranges.found[site.value]
        parameters.activations[site.value] = uniform_from_range(low, high, bits=8, scheme="asymmetric", signed=False)
    for layer in sites.weights:
        weight, _ = weight_of(graph, nodes[layer.node])  # type: ignore[misc]
        high = weight.abs().flatten(1).amax(1)
        parameters.weights[layer.node] = uniform_from_range(
            -high, high, bits=8, scheme="symmetric", signed=True, axis=0
        )
    return QuantizedModel(graph, sites, parameters, ORT.prepare(Recipe(scope="full")), {}, True)


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in (
            "abs",
            "atan",
            "ceil",
            "cos",
            "erf",
            "exp",
            "floor",
            "neg",
            "relu",
            "round",
            "sigmoid",
            "sign",
            "sin",
            "tanh",
        )
    },
    **{
        name: getattr(F, name)
        for name in ("hardsigmoid", "hardswish", "mish", "relu6", "selu", "silu", "softplus", "logsigmoid")
    },
    "log": lambda x: torch.log(x.abs() + 0.1),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 0.1),
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x: F.elu(x, 0.7),
    "celu": lambda x: F.celu(x, 1.3),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "softplus with beta": lambda x: F.softplus(x, 2.0),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.75),
    "prelu": module(nn.PReLU, 3),
    "prelu, one slope": module(nn.PReLU),
    "clamp": lambda x: x.clamp(-0.5, 1),
    "clamp below": lambda x: x.clamp(min=0.1),
    "clamp above": lambda x: x.clamp(max=0.1),
    "add": lambda x: x + x.sigmoid(),
    "add a number": lambda x: x + 0.3,
    "sub": lambda x: x - x.sigmoid(),
    "number minus tensor": lambda x: 1 - x,
    "mul": lambda x: x * x.sigmoid().mean((2, 3), keepdim=True),
    "div": lambda x: x / (x.abs() + 1),
    "number over tensor": lambda x: 2 / (x.abs() + 1),
    "maximum": lambda x: torch.maximum(x, x.flip(3)),
    "minimum": lambda x: torch.minimum(x, x.flip(2)),
    "square": lambda x: x**2,
    "power": lambda x: x.abs().pow(x.sigmoid()),
    "power of a number": lambda x: 2.0**x,
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "where, two tensors": lambda x: torch.where(x >= x.mean(1, keepdim=True), x.exp(), 0.0),
    "masked fill": lambda x: x.masked_fill(~(x < 0.5), -3.0),
    "masked fill, not": lambda x: x.masked_fill(torch.logical_not(x <= 0.5), -3.0),
    "cumsum": lambda x: x.cumsum(2),
    "softmax": lambda x: x.softmax(1),
    "softmax, last axis": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(1),
    "glu": lambda x: F.glu(x, 2),
}

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": module(nn.LayerNorm, 8),
    "layer norm, plain": module(nn.LayerNorm, 8, elementwise_affine=False),
    "layer norm, without bias": module(nn.LayerNorm, 8, bias=False),
    "layer norm over two axes": module(nn.LayerNorm, (8, 8), eps=1e-3),
    "group norm": module(nn.GroupNorm, 3, 3),
    "group norm, one group": module(nn.GroupNorm, 1, 3),
    "group norm of tokens": lambda x: F.group_norm(x.flatten(2), 1),
    "instance norm": module(nn.InstanceNorm2d, 3, affine=True),
    "rms norm": module(nn.RMSNorm, 8),
    "rms norm with eps": module(nn.RMSNorm, 8, eps=1e-3, elementwise_affine=False),
    "batch norm": module(nn.BatchNorm2d, 3),
    "normalize": lambda x: F.normalize(x, dim=1),
    "normalize, 1-norm": lambda x: F.normalize(x, 1.0, dim=-1),
    "mean": lambda x: x.mean((2, 3)),
    "mean, kept": lambda x: x.mean(1, keepdim=True),
    "sum": lambda x: x.sum((1, -1)),
    "largest": lambda x: x.amax((2, 3)),
    "smallest": lambda x: x.amin(1, keepdim=True),
    "max over an axis": lambda x: x.max(-1).values,
    "variance": lambda x: x.var((2, 3)),
    "variance, biased": lambda x: x.var(1, unbiased=False, keepdim=True),
    "variance and mean": lambda x: torch.cat(torch.var_mean(x, 1, correction=0, keepdim=True), 1),
    "standard deviation": lambda x: x.std((2, 3)),
}

LAYOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda x: x.reshape(-1, 8, 24),
    "flatten": lambda x: x.flatten(1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(-1, -3),
    "unsqueeze": lambda x: x.unsqueeze(-1).unsqueeze(1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "squeeze of several": lambda x: x[:, :1, :, :1].squeeze((1, 3)),
    "unbind": lambda x: x.unbind(1)[2],
    "split": lambda x: torch.cat(x.split(3, 2)[::-1], 2),
    "split with sizes": lambda x: torch.cat(x.split([1, 5, 2], -1)[::-1], -1),
    "split into one": lambda x: x.split(8, 2)[0],
    "chunk": lambda x: torch.cat(x.chunk(3, 2)[::-1], 2),
    "select": lambda x: x[:, -1, 3],
    "slice": lambda x: x[:, :, 1:-2, ::2],
    "expand": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "constant expanded": lambda x: torch.cat([x, torch.arange(8.0).view(1, 1, 1, 8).expand(x.shape[0], 1, 8, 8)], 1),
    "roll": lambda x: x.roll((3, -2), (2, 3)),
    "flip": lambda x: x.flip((1, 3)),
    "pixel shuffle": lambda x: F.pixel_shuffle(torch.cat([x, x, x, -x], 1), 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 4),
    "channel shuffle": lambda x: F.channel_shuffle(torch.cat([x, x.flip(1)], 1), 2),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat with a new axis": lambda x: x.repeat(1, 1, 2, 1, 1).flatten(0, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "index": lambda x: x[:, :, torch.tensor([3, 0, 3])],
    "index, two tensors": lambda x: x[:, :, torch.tensor([3, 0]), torch.tensor([[1], [-1]])],
    "unfold along an axis": lambda x: x.unfold(2, 3, 2),
    "cat": lambda x: torch.cat([x, x * 2, x[:, :1]], 1),
    "stack": lambda x: torch.stack([x, x * 2], -1),
    "windows": lambda x: x.view(-1, 3, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 3).flip(1).view(-1, 4, 48),
}

SPATIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": module(nn.Conv2d, 3, 5, 3),
    "conv, all arguments": module(
        nn.Conv2d, 3, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=3, bias=False
    ),
    "conv, even kernel, same": module(nn.Conv2d, 3, 5, 4, padding="same"),
    "conv, reflecting": module(nn.Conv2d, 3, 5, 3, padding=1, padding_mode="reflect"),
    "conv with computed weights": lambda x: F.conv2d(x, KERNEL * x.amax((0, 2, 3), keepdim=True).sigmoid()),
    "conv1d": lambda x: F.conv1d(x.flatten(2), torch.ones(4, 3, 3), padding=2, stride=2),
    "conv3d": lambda x: F.conv3d(x[:, None], torch.ones(2, 1, 2, 3, 3), padding=(0, 1, 1)),
    "transposed conv": module(nn.ConvTranspose2d, 3, 4, 3, stride=2, padding=1, output_padding=1),
    "transposed conv, groups": module(nn.ConvTranspose2d, 3, 6, 2, stride=2, groups=3, bias=False),
    "transposed conv1d": lambda x: F.conv_transpose1d(x.flatten(2), torch.ones(3, 4, 3), stride=2),
    "linear": module(nn.Linear, 8, 5),
    "linear, without bias": lambda x: F.linear(x.flatten(1), torch.ones(2, 192)),
    "linear on tokens": lambda x: F.linear(x.flatten(2).transpose(1, 2), MATRIX).relu() + 1,
    "linear, pictures second": lambda x: F.linear(x.flatten(2).permute(2, 0, 1), MATRIX).relu().permute(1, 2, 0),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "matmul, broadcast": lambda x: x @ x[:, :1].transpose(-1, -2),
    "matmul with constants": lambda x: torch.ones(3, 4, 8) @ x,
    "einsum": lambda x: torch.einsum("nchw,ncvw->nchv", x, x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.flip(1), x),
    "attention, masked": lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(8, dtype=torch.bool)),
    "attention, masked by data": lambda x: F.scaled_dot_product_attention(x, x, x, x >= x.amin(-1, keepdim=True)),
    "average pooling": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average pooling, borders not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average pooling, rounded up": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "average pooling, rounded up, padded": lambda x: F.avg_pool2d(x, (3, 2), (2, 3), (1, 1), ceil_mode=True),
    "average pooling, rounded up, borders not counted": lambda x: F.avg_pool2d(
        x, 3, 2, 1, ceil_mode=True, count_include_pad=False
    ),
    "average pooling, 1-D": lambda x: F.avg_pool1d(x.flatten(2), 4, 3, 1),
    "max pooling": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pooling, dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=3),
    "max pooling, rounded up": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "adaptive average pooling to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive average pooling, even": lambda x: F.adaptive_avg_pool2d(x, (4, 2)),
    "adaptive average pooling, uneven": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive average pooling to more": lambda x: F.adaptive_avg_pool2d(x, 11),
    "adaptive average pooling, 1-D": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 7),
    "adaptive max pooling": lambda x: F.adaptive_max_pool2d(x, (3, 4)),
    "nearest, doubled": lambda x: F.interpolate(x, scale_factor=2),
    "nearest to a size": lambda x: F.interpolate(x, (5, 13)),
    "nearest by an odd factor": lambda x: F.interpolate(x, scale_factor=1.7),
    "nearest, exact": lambda x: F.interpolate(x, (5, 13), mode="nearest-exact"),
    "bilinear, doubled": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear to a size": lambda x: F.interpolate(x, (5, 13), mode="bilinear"),
    "bilinear, corners": lambda x: F.interpolate(x, (5, 13), mode="bilinear", align_corners=True),
    "bilinear by an odd factor": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bilinear, smaller, antialiased": lambda x: F.interpolate(x, (3, 5), mode="bilinear", antialias=True),
    "bilinear, larger, antialiased": lambda x: F.interpolate(x, (11, 5), mode="bilinear", antialias=True),
    "bicubic, smaller, antialiased": lambda x: F.interpolate(x, (3, 5), mode="bicubic", antialias=True),
    "bicubic to a size": lambda x: F.interpolate(x, (5, 13), mode="bicubic"),
    "bicubic, corners": lambda x: F.interpolate(x, (5, 13), mode="bicubic", align_corners=True),
    "pad": lambda x: F.pad(x, (1, 2, 3, 0)),
    "pad with a value": lambda x: F.pad(x, (1, 2), value=-1.5),
    "pad, cropping": lambda x: F.pad(x, (1, -2, -1, 0)),
    "pad, reflect": lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
    "pad, replicate": lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"),
    "pad, circular": lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"),
    "unfold of patches": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "fold of patches": lambda x: F.fold(F.unfold(x, 3, padding=1, stride=2) * 2, (8, 8), 3, padding=1, stride=2),
}


TABLES = {"elementwise": ELEMENTWISE, "norms": NORMS, "layout": LAYOUT, "spatial": SPATIAL}


class Many(nn.Module):
    """All functions of a table side by side: one capture and one session for the whole of it."""

    def __init__(self, functions: Iterable[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.functions = list(functions)
        self.layers = nn.ModuleList(f for f in self.functions if isinstance(f, nn.Module))

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [function(x).flatten(1) for function in self.functions]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.outputs(x), 1)


@pytest.mark.parametrize("table", TABLES)
def test_float_form(table: str, tmp_path: Path) -> None:
    functions = TABLES[table]
    model = Many(functions.values()).eval()
    path = tmp_path / "float.onnx"
    ORT.export(float_model(capture(model, pictures(2))), path, False)  # type: ignore[misc]
    session = ORT.load(path, 1)  # type: ignore[misc]
    for count in (1, 3):
        x = pictures(count)
        with torch.no_grad():
            wanted = model.outputs(x)
        got = session.run(x).split([w.shape[1] for w in wanted], 1)
        wrong = {
            name: float((g - w).abs().max())
            for name, g, w in zip(functions, got, wanted, strict=True)
            if not (g - w).abs().max() <= 1e-5 * max(1.0, float(w.abs().max()))
        }
        assert not wrong


class Between(nn.Module):
    """A layout change between two layers, so that integer codes go through it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        width = function(torch.zeros(2, 3, 8, 8)).flatten(1).shape[1]
        self.first, self.function, self.last = module(nn.Conv2d, 3, 3, 1), function, module(nn.Linear, width, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.function(self.first(x)).flatten(1))
        return out


def test_layout_operators_move_codes(tmp_path: Path) -> None:
    functions = {name: f for name, f in LAYOUT.items() if name != "constant expanded"}
    model, x = Many(Between(f) for f in functions.values()).eval(), pictures(4)
    quantized = quantized_model(capture(model, x), x)
    path = tmp_path / "integer.onnx"
    ORT.export(quantized, path, True)  # type: ignore[misc]
    with torch.no_grad():
        wanted = quantized.simulation()(x).split(5, 1)
    got = ORT.load(path, 1).run(x).split(5, 1)  # type: ignore[misc]
    wrong = [
        name
        for name, g, w in zip(functions, got, wanted, strict=True)
        if not (g - w).abs().max() <= 0.01 * w.abs().max()  # a code next to the right one here and there
    ]
    assert not wrong


def test_unknown_operators_are_refused_by_name(tmp_path: Path) -> None:
    graph = capture(Net(lambda x: torch.special.bessel_j0(x)), pictures(2))
    with pytest.raises(TargetError, match="bessel_j0") as caught:
        ORT.export(float_model(graph), tmp_path / "float.onnx", False)  # type: ignore[misc]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "float.onnx").exists()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor"),
        (lambda x: (x > 0).int().sum(1), "cast"),
    ],
)
def test_unknown_arguments_are_refused(function: Callable[[Tensor], Tensor], said: str, tmp_path: Path) -> None:
    graph = capture(Net(function), pictures(2))
    with pytest.raises(TargetError, match=said):
        ORT.export(float_model(graph), tmp_path / "float.onnx", False)  # type: ignore[misc]


def test_no_lowering_is_registered_for_an_operator_that_does_not_exist() -> None:
    assert all(callable(target) for target in LOWERINGS)
