"""AdaLog: bases found by brute force, formats where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid import problem
from qhyvit.calibration.samples import ProductSample
from qhyvit.graph.patterns import folds
from qhyvit.methods.adalog import adalog
from qhyvit.methods.ranges import set_ranges
from qhyvit.quantizers.adalog import NUMERATORS, AdaLog
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.errors import product_error
from qhyvit.search.gather import gather

QUICK: dict[str, Any] = {"candidates": 16, "keep": 4, "steps": 3, "rounds": 1}


def test_the_base_of_softmax_is_the_best_of_all_for_the_product() -> None:
    case = problem(**QUICK)
    before = set_ranges(case, "mse")
    found = next(q for v, q in adalog(case).activations.items() if v.startswith("softmax"))
    assert isinstance(found, AdaLog)
    assert float(found.scale) == 1
    samples = gather(case, "none", 256).items()
    name, sample = next((n, s) for n, s in samples if isinstance(s, ProductSample) and float(s.a.min()) >= 0)
    node = next(n for n in case.graph.graph.nodes if n.name == name)
    values = next(s.value for s in case.sites.activations if name in s.readers and not s.value.startswith("softmax"))
    assert node.args[1] is not None
    b = before.activations[values](sample.b)  # the values' quantizer when the base was chosen
    errors = {q: float(product_error(sample, AdaLog(torch.ones(()), bits=4, q=q)(sample.a), b)) for q in NUMERATORS}
    assert errors[found.q] <= 1.0001 * min(errors.values())


@pytest.mark.parametrize("choice", ["adalog", "uniform", "best"])
def test_format_of_activation_outputs(choice: str) -> None:
    case = problem(activations=choice, **QUICK)
    parameters = adalog(case)
    behind = {v: q for v, q in parameters.activations.items() if v.startswith(("silu", "gelu"))}
    assert len(behind) == 4
    kinds = {type(q) for q in behind.values()}
    if choice != "best":
        assert kinds == {AdaLog if choice == "adalog" else UniformAffine}
    for value, quantizer in behind.items():
        if isinstance(quantizer, AdaLog):
            assert quantizer.shift == (0.1699712 if value.startswith("gelu") else 0.2784645)


def test_norm_outputs_are_reparameterized_only_at_equal_widths() -> None:
    equal, different = problem("w4a4", **QUICK), problem("w8a4", **QUICK)
    assert any("3 values reparameterized" in note for note in adalog(equal).notes)
    assert any("differ in width" in note for note in adalog(different).notes)
    for case in (equal, different):
        assert len(folds(case.graph, case.sites)) == 3


def test_weights_are_asymmetric_where_the_target_allows() -> None:
    free, bound = (adalog(problem("w4a4", target=t, **QUICK)) for t in ("simulate", "onnxruntime"))
    assert any(bool(q.zero_point.any()) for q in free.weights.values())
    assert not any(bool(q.zero_point.any()) for q in bound.weights.values())
    said = " ".join(bound.notes)
    assert "no kernel for asymmetric weights; they are symmetric instead" in said
    assert "no kernel for adalog; 4 outputs of activation functions are uniform instead" in said
