"""PTQ4ViT: candidates, groups, twin uniform quantizers, weighted objective."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid import Hybrid, problem
from qhyvit.calibration.gradients import gradients, kl_to_float
from qhyvit.calibration.samples import LayerSample, ProductSample
from qhyvit.methods.base import Problem
from qhyvit.methods.ptq4vit import SPLITS, factors, ptq4vit
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantized import QuantizedModel
from qhyvit.quantizers.twin import TwinUniform, twin_for_probabilities
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.errors import LayerError, product_error
from qhyvit.search.gather import gather
from qhyvit.search.scales import best_weight_step

QUICK = {"candidates": 20, "rounds": 1, "gradient": "none"}


def test_the_candidates_are_a_hundred_and_end_where_the_released_ones_do() -> None:
    found = factors()
    assert len(found) == 100
    assert float(found[0]) == pytest.approx(0.01)
    assert float(found[-1]) == pytest.approx(1.1881)
    assert torch.allclose(found.diff(), torch.tensor(0.0119), atol=1e-6)


def test_twin_uniform_stands_behind_softmax_and_activation_functions_alone() -> None:
    case = problem(**QUICK)
    parameters = ptq4vit(case)
    twins = {v: q for v, q in parameters.activations.items() if isinstance(q, TwinUniform)}
    mirrored = [v for v, q in twins.items() if q.mirrored]
    assert len(twins) == 5
    assert len(mirrored) == 4
    for value in mirrored:
        lowest = 0.1699712 if value.startswith("gelu") else 0.2784645
        assert float(twins[value].lower_step) == pytest.approx(lowest / 8)
    for value, quantizer in parameters.activations.items():
        if value not in twins:
            assert isinstance(quantizer, UniformAffine)
            assert quantizer.scheme == "symmetric"


def test_the_split_is_the_best_one_beside_float_values() -> None:
    case = problem(**QUICK)
    found = next(q for v, q in ptq4vit(case).activations.items() if v.startswith("softmax"))
    samples = [s for s in gather(case, "none", 512).values() if isinstance(s, ProductSample)]
    sample = min(samples, key=lambda s: float(s.a.min()) < 0)  # the product with probabilities
    errors = [float(product_error(sample, twin_for_probabilities(s, bits=4)(sample.a), sample.b)) for s in SPLITS]
    assert isinstance(found, TwinUniform)
    assert float(found.split) == SPLITS[errors.index(min(errors))]


def test_weights_have_one_step_per_tensor_per_part_or_per_channel() -> None:
    case = problem(**QUICK)
    parameters = ptq4vit(case)
    steps = {s.kind + str(s.shape[0]): parameters.weights[s.node].scale for s in case.sites.weights}
    fused = steps["linear48"]
    assert len(fused.unique()) == 3
    assert len(fused[:16].unique()) == len(fused[16:32].unique()) == len(fused[32:].unique()) == 1
    assert len(steps["linear7"].unique()) == 1
    assert len(steps["conv24"].unique()) > 12


def test_the_group_search_is_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 1, 12, generator=generator), torch.randn(6, 12, generator=generator)
    y = (x @ weight.t()).view(100, 1, 6)
    g = torch.rand(100, 1, 6, generator=generator)
    error = LayerError(LayerSample(x, y, g), weight, None, torch.arange(12)[None])
    groups = torch.tensor([0, 0, 1, 1, 1, 0])

    def errors(quantizer: torch.nn.Module) -> Tensor:
        return error(error.x, error.grouped(quantizer(weight)))

    chosen = best_weight_step(weight, groups, factors(50), 4, errors)
    for group in (0, 1):
        rows = weight[groups == group]
        base = rows.abs().max() / 7.5
        scores = []
        for f in factors(50):
            coded = torch.round(rows / (base * f)).clamp(-8, 7) * base * f
            difference = x[:, 0] @ (coded - rows).t()
            scores.append(float((g[:, 0, groups == group] * difference.square()).sum()))
        expected = base * factors(50)[scores.index(min(scores))]
        assert torch.allclose(chosen.scale[groups == group], expected.expand(3), rtol=1e-6)


def float_point_gradient(case: Problem, quantized: bool) -> float:
    images = next(case.pictures())
    with torch.no_grad():
        reference = case.graph(images)
    graph = case.graph
    if quantized:
        model = QuantizedModel(case.graph, case.sites, set_ranges(case, "minmax"), case.recipe, {}, False)
        graph = model.simulation(integer=False)
    layers = {s.node for s in case.sites.weights}
    return max(float(g.abs().max()) for g in gradients(graph, layers, images, kl_to_float(reference)).values())


def test_the_gradient_is_nothing_in_the_float_network_and_something_in_the_quantized_one() -> None:
    case = problem("w6a6", net=Hybrid)
    assert float_point_gradient(case, quantized=False) < 1e-5 * float_point_gradient(case, quantized=True)


def test_on_a_runtime_each_stand_in_is_named() -> None:
    case = problem("w8a8", target="onnxruntime", **QUICK)
    parameters = ptq4vit(case)
    said = " ".join(parameters.notes)
    assert "no kernel for twin-uniform; 1 softmax outputs are uint8 with step 1/255 and zero point 0 instead" in said
    assert "no kernel for twin-uniform; 4 outputs of activation functions are asymmetric uniform" in said
    assert all(isinstance(q, UniformAffine) for q in parameters.activations.values())
