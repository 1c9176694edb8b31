"""Biases that fit int32, and their correction: the error that quantization adds to each output, taken out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, fx

from qhyvit.graph.ops import channel_axis, only_activation
from qhyvit.progress import task
from qhyvit.quantized import QuantizedModel
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.prefix import Prefix, first_batches

PICTURES = 64  # walked through the net together, so that each layer sees its predecessors corrected
SAMPLED = 1 << 14  # numbers per channel that a shift before an activation function is fitted to
STEPS = 4  # of Gauss-Newton
LARGEST_BIAS = 2.0**30  # in units of the accumulator's scale
FLAT = 1e-2  # least mean square slope: where the activation function is flat, a shift does nothing but grow


def fit_biases(model: QuantizedModel) -> None:
    """Raise weight scales (one for the tensor or of single channels) whose biases would not fit int32 otherwise.

    Behind an input that hardly stirs on the calibration pictures, or with weights of nearly nothing, the scale of the
    accumulator is so fine that the bias leaves int32, and would be cut off there. What such weights add to that bias
    is less than it can tell apart, so their codes may be as much coarser. Half of int32 is left for corrections.

    Args:
        model: changed in place (`parameters.weights` and `parameters.codes`).
    """
    parameters = model.parameters
    for name in [s.node for s in model.sites.weights] if model.integer_bias else []:
        bias, scale = model.bias(name), model.bias_scale(name)
        if bias is None or scale is None:
            continue
        over = (bias.abs().double() / (LARGEST_BIAS * scale.double())).clamp_min(1.0)
        if bool((over == 1).all()):
            continue
        old = parameters.weights[name]
        over = over if old.axis is not None else over.max()
        new = (old.scale * over).to(old.scale)
        parameters.weights[name] = UniformAffine(
            new, old.zero_point, bits=old.bits, signed=old.signed, axis=old.axis, scheme=old.scheme
        )
        if name in parameters.codes:
            parameters.codes[name] = parameters.weights[name].quantize(old.dequantize(parameters.codes[name]))


def correct_biases(model: QuantizedModel, batches: Iterable[Tensor], *, alone: bool = False) -> None:
    """Shift the bias of every quantized layer so that its output errs least, in order, each behind corrected ones.

    Where an activation function f alone reads the output: b = argmin Σ (f(ŷ + b) - f(y))² per output channel. A mean
    error taken out before f comes back behind it, as f bends the noise around the mean. Elsewhere
    b = mean(y) - mean(ŷ) (DFQ, arXiv 1906.04721), which is the same with f the identity. y is the output in the float
    network, ŷ in the quantized one, where each bias is rounded as it is stored. No layer is skipped for a bias of zero.
    Uses the first `PICTURES` pictures at most.

    Args:
        model: changed in place (`parameters.biases`).
        batches: calibration pictures (n, 3, H, W).
        alone: every layer behind the float network instead, as if it were the only one that is quantized.
    """
    parameters, sites = model.parameters, {s.node for s in model.sites.weights}
    for name in sites:  # the walk starts from the float biases
        parameters.biases.pop(name, None)
    prefix = Prefix(model, parameters, first_batches(batches, PICTURES))
    with torch.no_grad(), task("Correcting biases", len(sites)) as advance:
        for node in prefix.nodes:
            prefix.advance([node])
            clean, noisy = prefix.clean[node.name], prefix.noisy[node.name]
            if alone:
                prefix.noisy[node.name] = clean
            if node.name not in sites:
                continue
            shift = _shift(node, clean, noisy)
            used = prefix.execution.bias(node)
            used = torch.zeros_like(shift) if used is None else used
            parameters.biases[node.name] = used + shift
            stored = prefix.execution.bias(node)
            assert stored is not None
            view = [1] * noisy[0].ndim
            view[channel_axis(node)] = -1
            for i, value in enumerate(noisy):  # one at a time: early layers' outputs are large
                noisy[i] = value + (stored - used).view(view)
            advance(1)


def _shift(node: fx.Node, clean: list[Tensor], noisy: list[Tensor]) -> Tensor:
    """What the bias of a layer gains (C_out,), from its outputs in both networks by batch."""
    axis, activation = channel_axis(node), only_activation(node)

    def rows(values: list[Tensor]) -> Iterator[Tensor]:
        """(C_out, n) of one batch after the other: together they would be a copy of all that the layer gives."""
        return (value.movedim(axis, 0).flatten(1) for value in values)

    counts = [value.numel() // value.shape[axis] for value in clean]
    if activation is None:
        total = torch.stack(
            [(y - x).sum(1, dtype=torch.float64) for y, x in zip(rows(clean), rows(noisy), strict=True)]
        )
        return (total.sum(0) / sum(counts)).to(clean[0].dtype)
    kept = torch.zeros(sum(counts), dtype=torch.bool)
    kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:SAMPLED]] = True
    picks = [part.nonzero().squeeze(1).to(clean[0].device) for part in torch.split(kept, counts)]
    y, x = (torch.cat([row[:, i] for row, i in zip(rows(v), picks, strict=True)], 1) for v in (clean, noisy))
    return behind(activation, y, x)


def behind(activation: Callable[[Tensor], Tensor], clean: Tensor, noisy: Tensor) -> Tensor:
    """The shift b (C,) of each channel with the least Σ (f(noisy + b) - f(clean))²; 0 where none is found.

    Args:
        activation: f, elementwise.
        clean: outputs in the float network (C, n).
        noisy: in the quantized one.
    """
    target, shift = activation(clean), torch.zeros_like(clean[:, :1])
    before = (activation(noisy) - target).square().mean(1, keepdim=True)
    for _ in range(STEPS):
        with torch.enable_grad():
            moved = (noisy + shift).requires_grad_()
            out = activation(moved)
            (slope,) = torch.autograd.grad(out.sum(), moved)
        missing = target - out.detach()
        step = (missing * slope).mean(1, keepdim=True) / slope.square().mean(1, keepdim=True).clamp_min(FLAT)
        shift = shift + step
    after = (activation(noisy + shift) - target).square().mean(1, keepdim=True)
    return torch.where(after < before, shift, 0.0).squeeze(1)
