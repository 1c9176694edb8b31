from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from qhyvit.errors import ModelError
from qhyvit.graph.capture import capture
from qhyvit.graph.serialise import from_json, to_json

aten = torch.ops.aten


class Net(nn.Module):
    """Convolution, attention over positions, an embedding table, a split, a constant spread over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.qkv = nn.Linear(8, 24)
        self.place = nn.Parameter(torch.randn(1, 16, 8))
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.conv(x)).flatten(2).transpose(1, 2) + self.place
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x[:, 0])


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(Net(), torch.zeros(1, 3, 8, 8))


def through_text(graph: fx.GraphModule) -> fx.GraphModule:
    return from_json(json.loads(json.dumps(to_json(graph), allow_nan=False)), dict(graph.named_buffers()))


def by_hand(*calls: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> fx.GraphModule:
    """A graph that applies functions one after the other; the last one's value is the output."""
    graph = fx.Graph()
    node = graph.placeholder("pictures")
    for function, args, kwargs in calls:
        node = graph.call_function(function, (node, *args), kwargs)
    graph.output(node)
    return fx.GraphModule(nn.Module(), graph)


def test_the_same_graph_comes_back(graph: fx.GraphModule) -> None:
    back = through_text(graph)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(back(x), graph(x))
    for old, new in zip(graph.graph.nodes, back.graph.nodes, strict=True):
        assert (new.name, new.op, new.target) == (old.name, old.op, old.target)
        assert repr(new.args) == repr(old.args)
        for key in ("module", "shape", "dtype"):
            assert new.meta.get(key) == old.meta.get(key), (old.name, key)
    assert to_json(back) == to_json(graph)


def test_the_batch_stays_free(graph: fx.GraphModule) -> None:
    sizes = [n for n in graph.graph.nodes if n.target == aten.sym_size.int]
    assert sizes, "the test net no longer has a symbolic size"
    assert through_text(graph)(torch.zeros(5, 3, 8, 8)).shape == (5, 5)


def test_a_cast_in_the_net_survives() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double().mean((2, 3)).float()

    graph = capture(Cast(), torch.zeros(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(through_text(graph)(x), graph(x))


def test_arguments_of_all_kinds_come_back() -> None:
    kwargs = {"dtype": torch.float64, "device": torch.device("cpu"), "memory_format": torch.channels_last}
    back = through_text(
        by_hand(
            (aten._to_copy.default, (), kwargs | {"layout": torch.strided}),
            (aten.clamp.default, (-math.inf, math.inf), {}),
            (aten.sym_size.int, (0,), {}),
            (operator.mul, (3,), {}),
        )
    )
    call, clamp, *_ = [n for n in back.graph.nodes if n.op == "call_function"]
    assert dict(call.kwargs) == kwargs | {"layout": torch.strided}
    assert clamp.args[1:] == (-math.inf, math.inf)
    assert back(torch.zeros(4, 3, 2, 2)) == 12


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(values)
def test_any_plain_argument_comes_back_and_stays_data(value: Any) -> None:
    graph = by_hand((aten.mul.Tensor, (value,), {}))
    node = next(n for n in through_text(graph).graph.nodes if n.op == "call_function")
    assert repr(node.args[1]) == repr(value)


def test_a_text_argument_is_not_run(tmp_path: Path) -> None:
    evil = f"'), open({str(tmp_path / 'pwned')!r}, 'w'), ('"
    through_text(by_hand((aten.gelu.default, (), {"approximate": evil})))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "posix.system",
        "torch.load",
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.setitem",
        "aten.save.default",
        "aten.from_file.default",
        "aten.from_file.out",
        "aten._print.default",
        "aten.warn.default",
        "aten.add_.Tensor",
        "aten.add.out",
        "aten.set_.source_Storage",
        "aten.resize_.default",
        "aten.__class__.default",
        "aten.conv2d.__class__",
        "aten.conv2d.__init__",
        "aten.conv2d",
        "aten.conv2d.nothing",
        "aten.nothing.default",
        "aten.conv2d.default.__call__",
        "prims.add.default",
        "profiler._record_function_enter_new.default",
        "",
        None,
        7,
        ["aten", "conv2d", "default"],
    ],
)
def test_other_targets_are_refused(target: Any) -> None:
    data = to_json(by_hand((aten.relu.default, (), {})))
    data["nodes"][1]["target"] = target
    with pytest.raises(ModelError, match=r"Node 1 of the graph \('relu_default'\).*only computes"):
        from_json(data, {})


@pytest.mark.parametrize(
    "name", ["x = 1; import os; y", 'a"); print(1); ("', "a.b", "1a", "class", "", "a\nb", None, 3]
)
@pytest.mark.parametrize("where", ["name", "placeholder", "constant", "keyword"])
def test_names_that_could_be_code_are_refused(name: Any, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    graph = fx.Graph()
    x, c = graph.placeholder("pictures"), graph.get_attr("c")
    graph.output(graph.call_function(aten.add.Tensor, (x, c), {"alpha": 1}))
    data = to_json(fx.GraphModule({"c": torch.zeros(1)}, graph))
    tensors = {"c": torch.zeros(1), name: torch.zeros(1)}
    if where == "name":
        data["nodes"][2]["name"] = name
    elif where == "keyword":
        data["nodes"][2]["kwargs"] = {name: 1}
    else:
        data["nodes"][0 if where == "placeholder" else 1]["target"] = name
    with pytest.raises(ModelError, match="not a plain name"):
        from_json(data, tensors)
    assert capsys.readouterr().out == ""


def damaged(**change: Any) -> dict[str, Any]:
    data = to_json(by_hand((aten.relu.default, (), {}), (aten.sum.dim_IntList, ([2, 3],), {"dtype": torch.float32})))
    for position, fields in change.items():
        data["nodes"][int(position[1:])] |= fields
    return data


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "not a list of nodes"),
        ({}, "not a list of nodes"),
        ({"nodes": []}, "no output"),
        ({"nodes": [1]}, "Node 0"),
        ({"nodes": damaged()["nodes"][:-1]}, "no output"),
        ({"nodes": [*damaged()["nodes"], damaged()["nodes"][-1]]}, "follows the output"),
        ({"nodes": [{"name": "x"}]}, "'op' is missing"),
        (damaged(n1={"op": "call_module"}), "'call_module' is not an operator"),
        (damaged(n1={"op": "call_method", "target": "cuda"}), "'call_method' is not an operator"),
        (damaged(n1={"args": [{"node": "later"}]}), "'later', which does not come before"),
        (damaged(n1={"args": [{"node": "sum_dim_int_list"}]}), "does not come before"),
        (damaged(n1={"args": [{"exec": "1"}]}), "unknown kind 'exec'"),
        (damaged(n1={"args": [{"node": "pictures", "float": "1"}]}), "several kinds"),
        (damaged(n2={"kwargs": {"dtype": {"dtype": "load"}}}), "'load' is no dtype"),
        (damaged(n2={"kwargs": {"dtype": {"dtype": "channels_last"}}}), "is no dtype"),
        (damaged(n1={"name": "pictures"}), "taken"),
        (damaged(n1={"op": "get_attr", "target": "gone", "args": []}), "no tensor 'gone'"),
        (damaged(n0={"args": ["import os"]}), "other arguments"),
    ],
)
def test_a_damaged_description_is_named(data: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        from_json(data, {})


def test_constants_of_another_model_are_refused(graph: fx.GraphModule) -> None:
    tensors = dict(graph.named_buffers())
    with pytest.raises(ModelError, match=r"'head_weight' is torch.float32 \[5, 9\]"):
        from_json(to_json(graph), tensors | {"head_weight": torch.zeros(5, 9)})
    with pytest.raises(ModelError, match=r"'head_weight' is torch.float64"):
        from_json(to_json(graph), tensors | {"head_weight": torch.zeros(5, 8, dtype=torch.float64)})


def test_what_could_not_be_read_is_not_written() -> None:
    module = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    with pytest.raises(ModelError, match="call_module"):
        to_json(module)
    with pytest.raises(ModelError, match="only computes"):
        to_json(by_hand((aten.add_.Tensor, (1,), {})))
    with pytest.raises(ModelError, match="type complex"):
        to_json(by_hand((aten.mul.Tensor, (1j,), {})))
    twins = by_hand((aten.relu.default, (), {}), (aten.relu.default, (), {}))
    for node in twins.graph.nodes:
        node.name = "twin" if node.op == "call_function" else node.name
    with pytest.raises(ModelError, match="'twin'"):
        to_json(twins)
