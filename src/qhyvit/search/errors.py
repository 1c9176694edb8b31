"""Weighted output errors of many candidates at once, on sampled positions.

E = Σ_n Σ_o w_no (ô_no - o_no)², w = importance × g² (Q-HyViT, arXiv 2303.12557, the objective). With `centred`, each
output channel's mean error is taken out first: that is the error once its bias is corrected for it, which costs a
runtime nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from qhyvit.calibration.samples import LayerSample, ProductSample
from qhyvit.quantizers.uniform import UniformAffine
from qhyvit.search.candidates import Candidates

CODING = 3  # multiply-adds that coding a number is worth, at least
_CELLS = 1 << 18  # numbers of a temporary at once, so that it stays in a core's cache


def in_chunks(cells: int, evaluate: Callable[[Candidates], Tensor], candidates: Candidates) -> Tensor:
    """Evaluate candidates that need `cells` numbers each, a few at a time."""
    return torch.cat([evaluate(piece) for piece in candidates.split(max(1, _CELLS // max(cells, 1)))])


class LayerError:
    """Weighted error of one convolution or linear on its sample.

    Args:
        sample: what to measure on.
        weight: float (C_out, …).
        bias: (C_out,) or None.
        channel_of: input channel of each (group, k), (G, K), for per-channel activation scales.
        centred: see the module.
    """

    def __init__(
        self, sample: LayerSample, weight: Tensor, bias: Tensor | None, channel_of: Tensor, *, centred: bool = False
    ) -> None:
        self.x = sample.x.transpose(0, 1).contiguous()  # (G, M, K)
        self.groups, self.positions, self.k = self.x.shape
        self.shape, self.centred, self.channel_of = weight.shape, centred, channel_of
        self.weight = self.grouped(weight)
        self.outputs = self.weight.shape[2]
        target = sample.y if bias is None else sample.y - bias.view(self.groups, -1)
        self.target = target.transpose(0, 1).contiguous()  # (G, M, O)
        self.importance = sample.weight.transpose(0, 1).contiguous()
        self.total = self.importance.sum(1)
        # Multiply-adds of running the layer once, its inputs coded first.
        self.cost = self.groups * self.positions * self.k * (self.outputs + CODING)
        first = self.importance[:, :, :1]
        self.uniform = bool((self.importance == first).all())  # the same weight for all outputs of a position

    def grouped(self, weight: Tensor) -> Tensor:
        """A weight (C_out, …) as (G, K, O)."""
        return weight.reshape(self.groups, -1, self.k).transpose(1, 2)

    def quantized_input(self, quantizer: UniformAffine | None) -> Tensor:
        """The sampled inputs through a quantizer, (G, M, K)."""
        return self.x if quantizer is None else self.coded(Candidates.of(quantizer))[0]

    def coded(self, candidates: Candidates) -> Tensor:
        """The sampled inputs through each candidate, (B, G, M, K)."""
        return candidates(self.x, self.channel_of[:, None, :])

    def per_position(self, channels: Tensor) -> Tensor:
        """Values per input channel (C_in,) at every row of the grouped weight, (G, K, 1)."""
        return channels[self.channel_of].unsqueeze(-1)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Inputs (…, G, M, K) times weights (G, K, O): (…, G, M, O)."""
        if self.outputs < 4:  # depthwise: quick with the positions along the long side
            rows = weight.transpose(1, 2).expand(*x.shape[:-2], -1, -1).reshape(-1, self.outputs, self.k)
            out = torch.bmm(rows, x.flatten(0, -3).transpose(1, 2))
            return out.view(*x.shape[:-2], self.outputs, -1).transpose(-1, -2)
        if x.ndim == 4 and self.groups == 1:
            return (x.flatten(0, 2) @ weight[0]).view(*x.shape[:-1], -1)
        return x @ weight

    def reading(self, x: Tensor, rest: Tensor) -> LayerError:
        """The layer with other inputs `x` (G, M, K), and `rest` (G, 1, O) as a part of its bias."""
        found = copy(self)
        found.x, found.target = x, self.target - rest
        return found

    def residual(self, x: Tensor, weight: Tensor) -> Tensor:
        """Output minus target of inputs (…, G, M, K) with weights (G, K, O): (…, G, M, O)."""
        return self.product(x, weight).sub_(self.target)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Errors per output channel, (…, C_out), of inputs (…, G, M, K) with weights (G, K, O)."""
        e = self.residual(x, weight)
        error = (e.square() * self.importance).sum(-2)
        if self.centred:
            error -= (e * self.importance).sum(-2).square() / self.total
        return error.flatten(-2)

    def shift(self, x: Tensor, weight: Tensor) -> Tensor:
        """The weighted mean error of each output channel, (C_out,): what its bias has to lose."""
        return ((self.residual(x, weight) * self.importance).sum(-2) / self.total).flatten()


class WeightError:
    """Errors of candidate weights of a layer, its input fixed.

    Where positions weigh alike for all outputs, by Gram matrices instead of running the layer: with e_n = ΔW x_n + r_n
    and r_n = W x_n - o_n, Σ w e² = ΔW G ΔWᵀ + 2 ΔW c + const, G = Σ w x xᵀ and c = Σ w r x. With more inputs than
    positions, G is the larger matrix: then the e_n themselves are summed. With gradients each output would need a G of
    its own; then the layer is run.

    Args:
        layer: the layer's error.
        x: its (quantized) inputs (G, M, K).
        weight: float, (C_out, …).
    """

    def __init__(self, layer: LayerError, x: Tensor, weight: Tensor) -> None:
        self.layer, self.x = layer, x
        self.rows = weight.reshape(layer.groups, layer.outputs, layer.k)  # (G, O, K)
        self.cost = self.rows.numel() * min(layer.k, layer.positions) if layer.uniform else layer.cost
        self._outputs = torch.arange(layer.groups * layer.outputs).view(layer.groups, layer.outputs, 1)
        if not layer.uniform:
            return
        w = layer.importance[:, :, :1]  # (G, M, 1)
        r = layer.residual(x, layer.grouped(weight))
        if layer.centred:
            share = w / w.sum(1, keepdim=True)
            x, r = x - (x * share).sum(1, keepdim=True), r - (r * share).sum(1, keepdim=True)
        self._wide = layer.k > layer.positions
        if self._wide:
            self._inputs, self._residual = ((t * w.sqrt()).transpose(1, 2).contiguous() for t in (x, r))
            return
        self._gram = x.transpose(1, 2) @ (x * w)  # (G, K, K)
        self._cross = (r * w).transpose(1, 2) @ x  # (G, O, K)
        self._rest = (r.square() * w).sum(1)  # (G, O)

    def __call__(self, candidates: Candidates) -> Tensor:
        """Errors (B, C_out)."""
        layer = self.layer
        if layer.uniform:
            return in_chunks(self.rows.numel(), self._by_position if self._wide else self._by_gram, candidates)
        runs = [layer(self.x, w.transpose(1, 2)) for c in candidates.split(1) for w in self._coded(c)]
        return torch.stack(runs)

    def _coded(self, candidates: Candidates) -> Tensor:
        """The weight through each candidate, (B, G, O, K)."""
        return candidates(self.rows, self._outputs)

    def _by_position(self, candidates: Candidates) -> Tensor:
        d = self._coded(candidates).sub_(self.rows)
        e = [torch.baddbmm(self._residual, one, self._inputs) for one in d]
        return torch.stack(e).square_().sum(-1).flatten(1)

    def _by_gram(self, candidates: Candidates) -> Tensor:
        d = self._coded(candidates).sub_(self.rows)
        product = torch.einsum("bgok,gkl->bgol", d, self._gram).add_(self._cross, alpha=2)
        return ((product * d).sum(-1) + self._rest).flatten(1)


class InputError:
    """Errors of candidates for the input of a layer, its weight fixed.

    Where positions weigh alike for all outputs, only the sum over the outputs is asked for, and it does not change when
    the outputs are rotated: with W = L Qᵀ, Q orthonormal, ‖x W - y‖² = ‖x L - y Q‖² + ‖y - y Q Qᵀ‖². A layer with more
    outputs than inputs thus costs as much as a square one. With gradients, or where each channel's own error is wanted
    (depthwise), the layer is run.

    Args:
        layer: the layer's error.
        weight: (quantized), (G, K, O).
        each: give the errors of all output channels.
    """

    def __init__(self, layer: LayerError, weight: Tensor, *, each: bool = False) -> None:
        self.layer, self.weight, self.target, self.each = layer, weight, layer.target, each
        self.run = each or not layer.uniform
        self.rest = 0.0
        if self.run:
            return
        w = layer.importance[:, None, :, 0]  # (G, 1, M)
        self._positions, self._shares = w.flatten(), w / w.sum(2, keepdim=True).sqrt()
        if layer.outputs > layer.k:
            q, r = torch.linalg.qr(weight.transpose(1, 2))
            self.weight, self.target = r.transpose(1, 2).contiguous(), layer.target @ q
            self.rest = float(self._total(torch.baddbmm(layer.target, self.target, q.transpose(1, 2), alpha=-1)))
        self._rows = layer.channel_of[:, None, :]

    def __call__(self, candidates: Candidates) -> Tensor:
        """Errors (B, C_out) with `each`, else (B, 1)."""
        layer = self.layer
        if self.run:
            cells = layer.groups * layer.positions * max(layer.k, layer.outputs)
            found = in_chunks(cells, lambda c: layer(layer.coded(c), self.weight), candidates)
            return found if self.each else found.sum(1, keepdim=True)
        return self._rotated(candidates)

    def _rotated(self, candidates: Candidates) -> Tensor:
        """Errors (B, 1) of some candidates."""
        found = [self._total(self._error(*one)) for one in candidates.each(self.layer.x, self._rows)]
        return torch.stack(found).view(-1, 1) + self.rest

    def _error(self, x: Tensor, scale: float) -> Tensor:
        """Output minus target (G, M, O) of inputs (G, M, K) times `scale`."""
        if self.layer.outputs < 4:
            return self.layer.product(x, self.weight).mul_(scale).sub_(self.target)
        return torch.baddbmm(self.target, x, self.weight, beta=-1, alpha=scale)

    def _total(self, e: Tensor) -> Tensor:
        """Σ w e², over the outputs too, of errors (G, M, O)."""
        total = torch.dot(torch.linalg.vector_norm(e, dim=-1).square_().flatten(), self._positions)
        if self.layer.centred:
            mean = torch.bmm(self._shares, e).flatten()
            total -= torch.dot(mean, mean)
        return total


def product_error(sample: ProductSample, a: Tensor, b: Tensor) -> Tensor:
    """Weighted errors (…,) of matmuls of activations (…, S, n, k), (…, S, k, m)."""
    e = (a @ b).sub_(sample.y).flatten(-3)
    error: Tensor = (
        torch.linalg.vector_norm(e, dim=-1).square_() if sample.alike else e.square_() @ sample.weight.flatten()
    )
    return error


def product_errors(sample: ProductSample, operands: str, other: Tensor, candidates: Candidates) -> Tensor:
    """Errors (B, 1) of candidates for operand "a" or "b" of a matmul, the other one fixed, or for both, "ab"."""
    heads = sample.head[:, None, None]

    def errors(c: Candidates) -> Tensor:
        a, b = (c(x, heads) if o in operands else other for o, x in (("a", sample.a), ("b", sample.b)))
        return product_error(sample, a, b)[:, None]

    def alone(steps: Tensor, scale: float) -> Tensor:
        """Of one scale for one operand, which is left to the product."""
        a, b = (steps, other) if operands == "a" else (other, steps)
        error: Tensor = torch.linalg.vector_norm(torch.baddbmm(sample.y, a, b, beta=-1, alpha=scale)).square_()
        return error

    if sample.alike and operands != "ab" and candidates.scale.shape[1] == 1:
        moving = sample.a if operands == "a" else sample.b
        return torch.stack([alone(*one) for one in candidates.each(moving)]).view(-1, 1)
    return in_chunks(max(sample.a.numel(), sample.b.numel(), sample.y.numel()), errors, candidates)
