"""Each normalising pass does what it says and leaves the float output as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from identity import captured, difference, kinds, pictures, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from qhyvit.errors import CaptureError
from qhyvit.graph import shapes
from qhyvit.graph.capture import capture
from qhyvit.graph.normalise import PASSES, normalise
from qhyvit.graph.ops import tidy


class Block(nn.Module):
    """Something for every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide, self.narrow = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.qkv = nn.Linear(8, 24)
        self.table = nn.Parameter(torch.randn(4, 2, 1, 1))
        self.gamma, self.project = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.stem(x)))
        x = (self.wide(x) + self.narrow(x)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).view(-1, 64, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = torch.exp(self.table)[:1].view(1, 2, 1, 1).repeat(1, 1, 64, 64)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(-1, 64, 8)
        x = x + self.gamma * F.dropout(self.project(y), 0.1, False)
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.mark.parametrize("position", range(len(PASSES)), ids=[p.__name__ for p in PASSES])
def test_every_pass_keeps_the_float_output_and_finds_work(position: int) -> None:
    model = randomise(Block()).double()
    x = pictures(3, (3, 8, 8), torch.float64)
    graph = capture(model, x, passes=False)
    shapes.infer(graph, x[:1])
    for before in PASSES[:position]:
        before(graph)
        tidy(graph)
        shapes.infer(graph, x[:1])
    assert difference(model, graph, x) <= 1e-10
    assert PASSES[position](graph) > 0
    tidy(graph)
    assert difference(model, graph, x) <= 1e-10


def test_captured_in_float32() -> None:
    model = randomise(Block())
    assert difference(model, capture(model, pictures(2, (3, 8, 8))), pictures(3, (3, 8, 8))) <= 1e-5


def test_normalising_twice_changes_nothing() -> None:
    graph = captured(Block())
    before = kinds(graph)
    assert not any(normalise(graph, pictures(1, (3, 8, 8))).values())
    assert kinds(graph) == before


def test_node_names_are_unique_and_tell_the_module() -> None:
    graph = captured(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten()))
    names = [n.name for n in graph.graph.nodes]
    assert len(set(names)) == len(names)
    assert [n for n in names if n.endswith("conv2d")] == ["n_0_conv2d", "n_2_conv2d"]


# BatchNorm, factors and offsets ---------------------------------------------------------------------------------------


def test_batch_norm_goes_into_the_convolution_before_it() -> None:
    graph = captured(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Flatten()))
    assert kinds(graph) == {"conv2d": 1, "reshape": 1}


def test_batch_norm_goes_through_a_flatten_into_the_linear_before_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x.flatten(1, 2))
            return self.norm(x.flatten(0, 1)).reshape_as(x).mean(1)

    found = kinds(captured(Net()))
    assert found["linear"] == 1
    assert not {"mul", "add", "batch_norm", "_native_batch_norm_legit_no_training"} & set(found)


def test_batch_norm_before_a_convolution_goes_forward_into_it() -> None:
    graph = captured(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3), nn.Flatten()))
    assert kinds(graph) == {"relu": 1, "conv2d": 1, "reshape": 1}


def test_batch_norm_goes_forward_through_a_mean_into_the_head() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.norm(F.silu(x)).mean((2, 3)))
            return out

    assert kinds(captured(Net())) == {"silu": 1, "mean": 1, "linear": 1}


def test_batch_norm_with_no_weights_near_becomes_a_depthwise_convolution() -> None:
    """Zero padding stands between the offset and the next weights: pushing it on would be wrong at the border."""
    graph = captured(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1), nn.Flatten()))
    assert kinds(graph) == {"relu": 1, "conv2d": 2, "reshape": 1}
    first = next(n for n in graph.graph.nodes if n.name.endswith("conv2d"))
    assert first.meta["shape"] == (1, 3, 8, 8)
    assert first.meta["module"] == "1"


def test_batch_norm_without_affine_parameters_is_folded() -> None:
    graph = captured(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Flatten()))
    assert kinds(graph) == {"conv2d": 1, "reshape": 1}


@pytest.mark.parametrize("convolution", [False, True])
def test_layer_scale_goes_into_the_branch(convolution: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Conv2d(3, 3, 3, padding=1) if convolution else nn.Linear(8, 8)
            self.gamma = nn.Parameter(torch.rand(3, 1, 1) if convolution else torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.gamma * self.branch(x)).flatten(1)

    found = kinds(captured(Net()))
    assert "mul" not in found
    assert found["add"] == 1


class Attention(nn.Module):
    def __init__(self, heads: int = 2, factor: float = 0.7) -> None:
        super().__init__()
        self.qkv, self.heads, self.factor = nn.Linear(8, 24), heads, factor

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q * self.factor) @ k.transpose(-2, -1)).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(n, length, width).mean(1)


def test_attention_scale_goes_into_the_rows_of_q_alone() -> None:
    model = Attention()
    graph = captured(model)
    assert "mul" not in kinds(graph)
    weight, bias = (dict(graph.named_buffers())[n] for n in sorted(dict(graph.named_buffers()), reverse=True))
    torch.testing.assert_close(weight[:8], model.qkv.weight[:8] * 0.7)
    torch.testing.assert_close(bias[:8], model.qkv.bias[:8] * 0.7)
    assert torch.equal(weight[8:], model.qkv.weight[8:])
    assert torch.equal(bias[8:], model.qkv.bias[8:])


# Parallel branches ----------------------------------------------------------------------------------------------------


class Reparameterizable(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.three = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(6))
        self.one = nn.Sequential(nn.Conv2d(6, 6, 1, groups=groups, bias=False), nn.BatchNorm2d(6))
        self.identity = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        return F.relu(self.three(x) + self.one(x) + self.identity(x)).flatten(1)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_reparameterizable_branches_become_one_convolution(groups: int) -> None:
    assert kinds(captured(Reparameterizable(groups), (6, 8, 8))) == {"silu": 1, "conv2d": 1, "relu": 1, "reshape": 1}


@pytest.mark.parametrize("kernel", [(1, 5), (5, 1), (3, 3)])
def test_kernels_of_other_sizes_are_merged_where_they_are_centred_alike(kernel: tuple[int, int]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Conv2d(3, 4, 5, 2, 2)
            self.small = nn.Conv2d(3, 4, kernel, 2, (kernel[0] // 2, kernel[1] // 2), bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.small(x) + self.large(x)).flatten(1)

    assert kinds(captured(Net())) == {"conv2d": 1, "reshape": 1}


def test_branches_with_other_strides_or_dilations_or_borders_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.dilated = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=2, dilation=2)
            self.wide = nn.Conv2d(3, 4, 5, padding=2)
            self.shifted = nn.Conv2d(3, 4, (1, 3), padding=(0, 1))

        def forward(self, x: Tensor) -> Tensor:
            shifted = self.shifted(F.pad(x, (0, 0, 1, 0)))[:, :, :-1]
            return (F.relu(self.plain(x) + self.dilated(x)) + F.relu(self.wide(x) + shifted)).flatten(1)

    assert kinds(captured(Net()))["conv2d"] == 4


def test_averaged_heads_become_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(192, 5), nn.Linear(192, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return (self.first(x) + self.second(x)) / 2

    assert kinds(captured(Net())) == {"reshape": 1, "linear": 1}


def test_a_branch_that_is_read_elsewhere_is_not_merged() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x)
            return torch.cat([a + self.second(x), F.relu(a)], 1).flatten(1)

    assert kinds(captured(Net()))["conv2d"] == 2


def test_a_bare_residual_is_not_merged_into_the_kernel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.conv(x)).flatten(1)

    assert kinds(captured(Net()))["add"] == 1


# Attention ------------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Fused attention over 16 positions with some mask."""

    def __init__(self, mask: str = "none", scale: float | None = None) -> None:
        super().__init__()
        self.qkv, self.mask, self.scale = nn.Linear(3, 24), mask, scale
        allowed = torch.rand(16, 16) > 0.4
        self.register_buffer("allowed", allowed | torch.eye(16, dtype=torch.bool))
        self.bias = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        masks = {"none": None, "float": self.bias, "bool": self.allowed}
        if self.mask == "data":
            masks["data"] = (x[:, None, None, :, 0] > 0) | (
                x[:, None, None, :, 0] <= x[:, None, None, :, 0].amin(-1, True)
            )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[self.mask], scale=self.scale)
        return out.transpose(1, 2).flatten(2).mean(1)


@pytest.mark.parametrize("mask", ["none", "float", "bool", "data"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fused_attention_is_opened(mask: str, scale: float | None) -> None:
    found = kinds(captured(Fused(mask, scale), (3, 4, 4)))
    assert found["matmul"] == 2
    assert found["softmax"] == 1
    assert "scaled_dot_product_attention" not in found
    assert "mul" not in found  # the scale is in the rows of q
    assert found["add"] == (mask in {"float", "bool"})
    assert found["where"] == (mask == "data")


def test_causal_attention_is_refused_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Causal()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x.flatten(2))
            return out.mean(1)

    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    with pytest.raises(CaptureError, match=r"inner: causal"):
        capture(Net(), pictures(2, (3, 4, 4)))


# Plain and functional -------------------------------------------------------------------------------------------------


def test_dropout_and_copies_leave_no_trace() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x.clone().contiguous(), 0.5, self.training).detach()
            return F.dropout2d(x.float() * 1 + 0, 0.5, self.training).flatten(1)

    graph = capture(Net(), pictures(2, (3, 4, 4)))
    assert kinds(graph) == {"reshape": 1}
    assert difference(Net().eval(), graph, pictures(3, (3, 4, 4))) == 0


def test_in_place_operators_become_plain() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu_(x * 2)
            y.add_(x).mul_(0.5)
            y[:, 1:] = y[:, 1:].sigmoid()
            y[:, 0] += 1
            return y.flatten(1)

    graph = captured(Net())
    assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in graph.graph.nodes)
    assert not {"slice_scatter", "select_scatter", "copy"} & set(kinds(graph))


def test_an_in_place_operator_changes_what_dropout_passed_on() -> None:
    """In eval mode dropout returns its input itself, so that whoever reads that input later sees it changed."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = F.relu_(F.dropout(y, 0.5, self.training))
            return (y + z.sigmoid()).flatten(1)

    captured(Net())


def test_in_place_operators_that_have_no_plain_form_are_decomposed() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = (x * 2).masked_fill_(x > 1, 0.5).addcmul_(x, x, value=0.3)
            return y.sub_(x, alpha=2).flatten(1)

    assert not {"masked_fill", "addcmul"} & set(kinds(captured(Net())))


def test_autocast_and_no_grad_regions_are_inlined() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm2d(3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                x = self.linear(x.float())
                with torch.no_grad():
                    a, b = x.split([2, 3], -1)
            return torch.cat([b, a], -1).mean((1, 2))

    model = Net()
    graph = capture(model, pictures(2, (3, 8, 8)))
    assert difference(model, graph, pictures(3, (3, 8, 8))) <= 1e-6
    assert all(n.op in {"placeholder", "get_attr", "call_function", "output"} for n in graph.graph.nodes)
    assert not any("wrap_with" in kind for kind in kinds(graph))
    (linear,) = (n for n in graph.graph.nodes if n.target == torch.ops.aten.linear.default)
    assert linear.meta["module"] == "linear"


def test_autocast_to_a_lower_precision_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = self.linear(x)
            return out.float().mean((1, 2))

    with pytest.raises(CaptureError, match="autocast"):
        capture(Net(), pictures(2, (3, 8, 8)))
    with pytest.raises(CaptureError, match="float16"):
        capture(nn.Conv2d(3, 4, 1).half(), pictures(2, (3, 8, 8)).half())


def test_recurrent_layers_are_refused_by_name() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.LSTM(24, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.rows(x.transpose(1, 2).flatten(2))[0].mean(1))
            return out

    with pytest.raises(CaptureError, match=r"^rows is recurrent \(LSTM\)"):
        capture(Recurrent(), torch.zeros(1, 3, 8, 8))


def test_what_depends_on_constants_alone_is_computed_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 8))
            self.register_buffer("index", torch.randint(0, 9, (8,)))
            self.mlp = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            bias = self.mlp(torch.tanh(self.table))[self.index]
            return (x + bias.softmax(-1)).flatten(1)

    assert kinds(captured(Net())) == {"add": 1, "reshape": 1}


def test_what_is_the_same_for_every_picture_is_computed_once() -> None:
    """Positional encodings that are built for the batch at hand."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Conv2d(2, 3, 1)
            self.token = nn.Parameter(torch.randn(1, 1, 3))

        def forward(self, x: Tensor) -> Tensor:
            n, _, h, w = x.shape
            rows = torch.ones(n, h, w, dtype=x.dtype).cumsum(1)
            columns = torch.ones(n, h, w, dtype=x.dtype).cumsum(2)
            x = x + self.project(torch.stack([rows, columns], 1) / 7)
            x = torch.cat([self.token.expand(n, -1, -1), x.flatten(2).transpose(1, 2)], 1)
            return x.mean(1)

    found = kinds(captured(Net()))
    assert not {"cumsum", "stack", "full", "ones", "conv2d", "div"} & set(found)
    assert found["expand"] == 1  # of the token, which is concatenated


def test_names_of_constants_do_not_collide() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b, self.a = nn.Linear(8, 8, bias=False), nn.Module()
            self.a.b_weight = nn.Parameter(torch.randn(8))
            self.training_ = nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = F.relu(self.a_b(x)) * self.a.b_weight
            return out.mean((1, 2))

    captured(Net())


def test_shared_weights_are_folded_for_each_use_by_itself() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.one(self.conv(x)) + F.relu(self.two(self.conv(F.silu(x))))).flatten(1)

    assert "mul" not in kinds(captured(Net()))


@pytest.mark.parametrize("bad", ["outputs", "control", "batch"])
def test_what_cannot_be_captured_is_refused_in_one_sentence(bad: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> object:
            if bad == "outputs":
                return x.mean((2, 3)), x
            if bad == "control":
                return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))
            return x.reshape(2, 3, -1).mean(-1)

    with pytest.raises(CaptureError) as caught:
        capture(Net(), pictures(2, (3, 4, 4)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_the_model_itself_is_left_alone() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten()))
    before = copy.deepcopy(model.state_dict())
    capture(model, pictures(2, (3, 8, 8)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
