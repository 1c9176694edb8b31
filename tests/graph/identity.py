"""Whether a captured graph computes what the module computes."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, fx, nn

from qhyvit.graph.capture import capture


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorm statistics and layer scales values that a fold cannot get right by chance."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
        for name, parameter in module.named_parameters(recurse=False):
            if "gamma" in name or name.startswith("ls"):
                nn.init.uniform_(parameter, 0.3, 1)
    return model.eval()


def pictures(count: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(count)).to(dtype)


def difference(model: nn.Module, graph: nn.Module, x: Tensor) -> float:
    """Largest difference of the outputs relative to the largest output."""
    with torch.no_grad():
        wanted, got = model(x), graph(x)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    return float((got - wanted).abs().max() / wanted.abs().max())


def captured(model: nn.Module, size: tuple[int, ...] = (3, 8, 8)) -> fx.GraphModule:
    """Capture in float64 with two pictures, check there and in float32 with other numbers of them."""
    model = randomise(copy.deepcopy(model)).double()
    graph = capture(model, pictures(2, size, torch.float64))
    for count in (1, 3):
        assert difference(model, graph, pictures(count, size, torch.float64)) <= 1e-10
    model, graph = model.float(), graph.float()
    assert difference(model, graph, pictures(3, size)) <= 1e-5
    return graph


def kinds(graph: fx.GraphModule) -> Counter[str]:
    """How often each operator occurs, by its name without namespace and overload."""
    found: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            found[schema.name.removeprefix("aten::") if schema else node.target.__name__] += 1
    return found
