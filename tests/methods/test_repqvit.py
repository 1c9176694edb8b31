"""RepQ-ViT: an exact fold, integer zero points, log √2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hybrid import SIDE, WIDTH, Hybrid, logits, problem
from qhyvit.errors import RecipeError
from qhyvit.graph.patterns import folds
from qhyvit.methods.repqvit import log_sqrt2_from_percentiles, reparameterize, repqvit, shared_scale
from qhyvit.pipeline import quantize
from qhyvit.quantizers.log import LogSqrt2
from qhyvit.quantizers.uniform import affine_parameters
from qhyvit.search.rows import sample_rows
from qhyvit.verification import verify
from tiny import Tiny, calibration


def channel_ranges(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ranges of very different widths and places."""
    generator = torch.Generator().manual_seed(1)
    low = -torch.rand(count, generator=generator) * torch.logspace(-1, 1, count)
    return low.to(dtype), (low.abs() * torch.rand(count, generator=generator) * 3).to(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_the_fold_leaves_the_float_function_unchanged(dtype: torch.dtype, bound: float) -> None:
    """Through LayerNorm → linear, GroupNorm → 1×1 convolution, and a convolution with BatchNorm's place → 1×1."""
    case = problem(dtype=dtype)
    before = logits(case)
    found = folds(case.graph, case.sites, layers=True)
    assert {str(f.producer.target).split(".")[1] for f in found} == {"layer_norm", "group_norm"}
    for fold in found:
        reparameterize(case, fold, *channel_ranges(WIDTH, dtype), 8)
    case.graph.recompile()
    assert float((logits(case) - before).abs().max() / before.abs().max()) <= 4 * bound  # three folds, eight layers


class Chain(nn.Module):
    """BatchNorm (folded into the convolution before it) → 1×1 convolution, and → padded 3×3 convolution."""

    kernel = 1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, self.kernel, padding=self.kernel // 2), nn.Linear(6, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.norm(self.first(x))).relu().mean((2, 3)))
        return out


class Padded(Chain):
    kernel = 3


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_a_batch_norm_in_the_convolution_before_is_folded_too(dtype: torch.dtype, bound: float) -> None:
    case = problem(net=Chain, dtype=dtype)
    before = logits(case)
    (fold,) = folds(case.graph, case.sites, layers=True)
    assert fold.shiftable
    reparameterize(case, fold, *channel_ranges(8, dtype), 8)
    assert float((logits(case) - before).abs().max() / before.abs().max()) <= 2 * bound


def test_behind_zero_padding_only_scales_are_folded() -> None:
    case = problem(net=Padded, dtype=torch.float64)
    before = logits(case)
    (fold,) = folds(case.graph, case.sites, layers=True)
    assert not fold.shiftable
    quantizer = reparameterize(case, fold, *channel_ranges(8, torch.float64), 8)
    assert int(quantizer.zero_point) == 128
    assert not any(n.target == torch.ops.aten.add.Tensor for n in case.graph.graph.nodes)  # nothing left to run
    assert float((logits(case) - before).abs().max() / before.abs().max()) <= 1e-13


def test_codes_of_both_quantizers_are_the_same_before_rounding() -> None:
    """x' / s̃ + z̃ = x / s + z for x' = (x + s·r2) / r1."""
    low, high = (end.abs().sqrt() * end.sign() for end in channel_ranges(24, torch.float64))
    scale, zero = affine_parameters(low, high, bits=6, scheme="asymmetric", signed=False)
    shared, mean, ratio, shift = shared_scale(scale, zero, 6)
    assert mean.dtype == torch.int32
    assert 0 <= int(mean) <= 63
    assert not torch.equal(zero.double().mean(), mean.double())  # the mean is no integer here
    x = torch.randn(50, 24, dtype=torch.float64)
    changed = (x + scale * shift) / ratio
    assert torch.allclose(changed / shared + mean, x / scale + zero, rtol=1e-12, atol=1e-11)


def test_a_dead_channel_is_not_blown_up() -> None:
    scale = torch.tensor([1.0, 1.0, 1e-9, 1.0])
    _, _, ratio, _ = shared_scale(scale, torch.zeros(4, dtype=torch.int32), 8)
    assert float(ratio.min()) == 1 / 64


def test_norm_outputs_get_per_channel_precision() -> None:
    """At four bits, the noise of the channel that suffers most, relative to that channel."""
    worst = {}
    for fold in ("none", "norms"):
        case = problem("w8a4", fold=fold)
        parameters = repqvit(case)
        site = folds(case.graph, case.sites)[0].site
        x = sample_rows(case, {site.value: site.channel_axis}, 512)[site.value]
        quantizer = parameters.uniform(site.value)
        assert quantizer.axis is None
        worst[fold] = float(((quantizer(x) - x).square().mean(0) / x.var(0)).max())
    assert worst["norms"] < 0.3 * worst["none"]


def test_softmax_is_log_sqrt2_where_the_target_has_it() -> None:
    parameters = repqvit(problem())
    softmax = [q for q in parameters.activations.values() if isinstance(q, LogSqrt2)]
    assert len(softmax) == 1
    assert parameters.notes == ["repqvit: 3 values reparameterized, so that all their channels have one scale"]


def test_on_a_runtime_softmax_falls_back_and_says_so() -> None:
    case = problem("w8a8", target="onnxruntime")
    parameters = repqvit(case)
    (value,) = [s.value for s in case.sites.activations if s.value.startswith("softmax")]
    quantizer = parameters.uniform(value)
    assert float(quantizer.scale) == pytest.approx(1 / 255)
    assert int(quantizer.zero_point) == 0
    said = " ".join(parameters.notes)
    assert "no kernel for log-sqrt2; 1 softmax outputs are uint8 with step 1/255 and zero point 0 instead" in said
    assert "no kernel for asymmetric weights; they are symmetric instead" in said


def test_a_net_without_norms_is_told() -> None:
    parameters = repqvit(problem(net=Tiny))
    assert any("no norm feeds only linears and convolutions" in note for note in parameters.notes)


def test_scale_of_log_sqrt2_is_the_best_percentile() -> None:
    x = torch.cat([torch.rand(9990) * 0.1, torch.full((10,), 1.0)])
    tried = {}
    for p in (50.0, 99.0, 99.95):
        quantizer = log_sqrt2_from_percentiles(x, 4, (p,))
        tried[p] = float((quantizer(x) - x).square().sum())
    best = log_sqrt2_from_percentiles(x, 4, (50.0, 99.0, 99.95))
    assert float((best(x) - x).square().sum()) == pytest.approx(min(tried.values()))


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"options\.percentile'.*did you mean 'percentiles'"):
        repqvit(problem(percentile=[99]))
    with pytest.raises(RecipeError, match=r"options\.fold"):
        repqvit(problem(fold="all"))
    with pytest.raises(RecipeError, match=r"options\.percentiles\.0"):
        repqvit(problem(percentiles=[20]))


def test_export_computes_what_the_simulation_does(tmp_path: Path) -> None:
    model = quantize(Hybrid(), calib=calibration(), input_size=SIDE, method="repqvit")
    assert verify(model, calibration()).sqnr_db > 40
