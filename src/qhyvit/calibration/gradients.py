"""Gradients of a loss with respect to inner values: the diagonal Hessian weights of the reconstruction error.

H^(O) ≈ diag(g²), g = ∂L/∂O (Q-HyViT, arXiv 2303.12557, section on the objective). At the float point the loss between
a network and itself has no gradient but rounding noise, so g is taken elsewhere: at the network quantized with
default parameters (the paper's), or from labels drawn from the float network's own predictions (Fisher). The noise
itself is what the released code uses (source "float"); it is kept for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from qhyvit.calibration.collect import Watcher

Source = Literal["default_quant", "fisher", "float", "none"]
Loss = Callable[[Tensor], Tensor]


def kl_to_float(reference: Tensor) -> Loss:
    """KL(softmax(reference) ‖ softmax(logits)), batch mean; logits (n, classes)."""
    target = F.log_softmax(reference.detach(), -1)
    return lambda logits: F.kl_div(F.log_softmax(logits, -1), target, log_target=True, reduction="batchmean")


def sampled_label_loss(reference: Tensor, generator: torch.Generator) -> Loss:
    """Cross-entropy with labels drawn from softmax(reference): its squared gradients average to the Fisher diagonal."""
    labels = torch.multinomial(torch.softmax(reference.detach(), -1), 1, generator=generator).squeeze(1)
    return lambda logits: F.cross_entropy(logits, labels)


def gradients(graph: fx.GraphModule, names: Iterable[str], images: Tensor, loss: Loss) -> dict[str, Tensor]:
    """∂loss/∂value of named nodes.

    Args:
        graph: a float graph, or a simulation with straight-through quantizers.
        names: nodes; those that the loss does not depend on are left out of the result.
        images: (n, 3, H, W).
        loss: from logits to a scalar.

    Returns:
        By name, in the value's shape.
    """
    values: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Tensor) -> None:
        if value.requires_grad:
            value.retain_grad()
            values[node.name] = value

    with torch.enable_grad():
        loss(Watcher(graph, names, keep).run(images.clone().requires_grad_())).backward()  # type: ignore[no-untyped-call]
    return {name: value.grad for name, value in values.items() if value.grad is not None}
