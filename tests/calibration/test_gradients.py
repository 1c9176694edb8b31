"""Gradients that weight the reconstruction error."""

from __future__ import annotations

import torch
from torch import nn

from qhyvit.calibration.gradients import gradients, kl_to_float, sampled_label_loss
from qhyvit.graph.capture import capture


def small() -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(4, 3, 8, 8)
    return capture(net, x), x


def conv_name(graph: torch.fx.GraphModule) -> str:
    return next(n.name for n in graph.graph.nodes if "conv2d" in n.name)


def test_at_the_float_point_the_gradient_is_noise_and_beside_it_is_not() -> None:
    graph, x = small()
    name = conv_name(graph)
    logits = graph(x).detach()
    noise = gradients(graph, [name], x, kl_to_float(logits))[name].square().mean()
    shifted = gradients(graph, [name], x, kl_to_float(logits + 0.5 * torch.randn_like(logits)))[name].square().mean()
    sampled = sampled_label_loss(logits, torch.Generator().manual_seed(0))
    fisher = gradients(graph, [name], x, sampled)[name].square().mean()
    assert noise < 1e-6 * shifted
    assert noise < 1e-6 * fisher


def test_it_agrees_with_finite_differences() -> None:
    graph, x = small()
    reference = graph(x).detach() + torch.randn(4, 5)
    loss = kl_to_float(reference)
    name = conv_name(graph)
    g = gradients(graph, [name], x, loss)[name]
    bias = next(b for n, b in graph.named_buffers() if n.endswith("bias") and b.numel() == 8)
    step = torch.zeros(8)
    step[3] = 1e-2
    with torch.no_grad():
        bias += step
        up = loss(graph(x))
        bias -= 2 * step
        down = loss(graph(x))
        bias += step
    assert torch.isclose((up - down) / 2e-2, g[:, 3].sum(), rtol=2e-2, atol=1e-5)


def test_the_network_is_left_as_it_was() -> None:
    graph, x = small()
    before = graph(x)
    gradients(graph, [conv_name(graph)], x, kl_to_float(before.detach()))
    assert torch.equal(graph(x), before)
    assert not x.requires_grad
