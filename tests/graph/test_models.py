"""Whole nets: captured graphs compute what the modules compute, with another number of pictures than captured."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from identity import difference, kinds, pictures, randomise

import qhyvit.models  # noqa: F401  registers Mobile-Former with timm
from qhyvit.graph.capture import capture

SLOW = pytest.mark.slow
MODELS = [
    ("mobilevit_xxs", 64, {}),
    pytest.param("mobilevit_xs", 64, {}, marks=SLOW),
    pytest.param("mobilevit_s", 64, {}, marks=SLOW),
    ("mobilevitv2_050", 64, {}),
    pytest.param("mobilevitv2_075", 64, {}, marks=SLOW),
    pytest.param("mobilevitv2_100", 64, {}, marks=SLOW),
    ("efficientformer_l1", 224, {}),
    ("efficientformerv2_s0", 64, {"img_size": 64}),
    pytest.param("efficientformerv2_s1", 64, {"img_size": 64}, marks=SLOW),
    ("mobile_former_26m", 64, {}),
    pytest.param("mobile_former_96m", 64, {}, marks=SLOW),
    ("deit_tiny_patch16_224", 64, {"img_size": 64}),
    ("resnet18", 64, {}),
    pytest.param("mobilenetv3_small_100", 64, {}, marks=SLOW),
]


@pytest.mark.parametrize(("name", "side", "options"), MODELS)
def test_identity(name: str, side: int, options: dict[str, Any]) -> None:
    """Captured in float64, where only a wrong fold can differ; then the same graph in float32."""
    size = (3, side, side)
    model = randomise(timm.create_model(name, **options)).double()
    graph = capture(model, pictures(2, size, torch.float64))
    assert difference(model, graph, pictures(3, size, torch.float64)) <= 1e-10
    assert difference(model.float(), graph.float(), pictures(3, size)) <= 1e-5
    found = set(kinds(graph))
    assert not {"batch_norm", "_native_batch_norm_legit_no_training", "scaled_dot_product_attention", "dropout"} & found
    assert not {"view", "_unsafe_view", "clone", "bmm"} & found


@pytest.mark.slow
@pytest.mark.parametrize("name", [m[0] if isinstance(m, tuple) else m.values[0] for m in MODELS])
def test_identity_at_its_own_size_in_float32(name: str) -> None:
    model = randomise(timm.create_model(name))
    size = model.pretrained_cfg["input_size"]
    graph = capture(model, pictures(2, size))
    assert difference(model, graph, pictures(1, size)) <= 1e-5
    assert difference(model, graph, pictures(3, size)) <= 1e-5
