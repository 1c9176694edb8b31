"""A small Mobile-Former, with grouped convolutions and all kinds of blocks: captured, quantized, run by the runtime."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import nn

from qhyvit.data.dataset import open_dataset
from qhyvit.evaluation import evaluate
from qhyvit.graph.capture import capture
from qhyvit.graph.ops import aten
from qhyvit.models.mobile_former import MobileFormer, Sizes
from qhyvit.pipeline import quantize
from qhyvit.verification import verify
from quick import captured_once  # noqa: F401

SIDE = 64


@cache
def net() -> MobileFormer:
    """Linear weights so large that the logits differ from picture to picture, as in a trained net."""
    torch.manual_seed(0)
    net = MobileFormer(Sizes(8, 3, 32, 64, "L2-8 B2-8 D3-16 B2-24", groups=4, lite_stride=2), num_classes=5)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
    with torch.no_grad():
        for _ in range(20):
            net.train()(torch.randn(16, 3, SIDE, SIDE))
    return net.eval()


def test_captured_it_computes_the_same_for_any_number_of_pictures() -> None:
    module = net().double()
    try:
        graph = capture(module, torch.zeros(1, 3, SIDE, SIDE, dtype=torch.float64))
        x = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), module(x), rtol=0, atol=1e-10)
    finally:
        module.float()
    kinds = [node.target for node in graph.graph.nodes]
    assert kinds.count(aten.maximum.default) == 6  # dynamic ReLUs, kept as they are
    assert aten.batch_norm.default not in kinds


@pytest.mark.parametrize("scope", ["partial", "full"])
@pytest.mark.parametrize("method", ["minmax", "mse", pytest.param("qhyvit", marks=pytest.mark.slow)])
def test_quantized_and_run(method: str, scope: str) -> None:
    quantized = quantize(net(), calib="flowers", input_size=SIDE, method=method, scope=scope, calibration={"size": 32})
    pictures = open_dataset("flowers", "evaluation")
    scores = evaluate(quantized, pictures, limit=64)
    assert scores["simulated"] is not None
    assert scores["simulated"].sqnr_db is not None
    assert scores["simulated"].sqnr_db > 20
    found = verify(quantized, pictures, limit=64)
    assert found.sqnr_db > scores["simulated"].sqnr_db + 10  # the runtime errs far less than the quantization
    assert found.top1_agreement >= 63 / 64
    assert found.integer_ops > 50
