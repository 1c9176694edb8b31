"""The two networks that are run side by side are those that there are: the float graph and the simulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid import SIDE, Hybrid
from qhyvit.pipeline import quantize
from qhyvit.search.prefix import Prefix
from quick import captured_once, ranges_only  # noqa: F401


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias_correction": True}, {"scope": "full"}, {"target": "simulate"}, {"method": "erq"}],
    ids=str,
)
def test_both_networks_give_their_logits(changes: dict[str, Any]) -> None:
    images = torch.randn(12, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    model = quantize(Hybrid(), calib=images, input_size=SIDE, bits="w4a4", **ranges_only(changes))
    prefix = Prefix(model, model.parameters, images.split(5))
    prefix.advance(prefix.nodes)
    for values, graph in ((prefix.clean, model.graph), (prefix.noisy, model.simulation(integer=False))):
        logits = torch.cat(values[prefix.nodes[-1].name])
        torch.testing.assert_close(logits, graph(images), rtol=1e-4, atol=1e-5)
