"""Cosine distance between float and quantized outputs (EasyQuant, arXiv 2006.16669)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from qhyvit.calibration.samples import LayerSample, ProductSample
from qhyvit.search.errors import LayerError

TINY = 1e-5  # added to both, so that the cosine of zeros exists


class CosineError(LayerError):
    """1 - cos(O, Ô) of a layer on its sample; blind to a common factor of O and Ô.

    Args:
        sample: what to measure on.
        weight: float (C_out, …).
        bias: (C_out,) or None.
        channel_of: as for `LayerError`.
    """

    def __init__(
        self, sample: LayerSample, weight: Tensor, bias: Tensor | None, channel_of: Tensor, *, centred: bool = False
    ) -> None:
        super().__init__(sample, weight, bias, channel_of, centred=centred)
        self._y = sample.y.transpose(0, 1) + TINY  # (G, M, O)
        self._bias = TINY if bias is None else bias.view(len(self.x), 1, -1) + TINY

    def __call__(self, x: Tensor, weight: Tensor, rest: Tensor | None = None) -> Tensor:
        """Distance of each output channel (C_out,), of inputs (G, M, K) with weights (G, K, O)."""
        out = x @ weight + self._bias if rest is None else x @ weight + rest + self._bias
        return (1 - F.cosine_similarity(out, self._y, dim=1)).flatten()

    def whole(self, x: Tensor, weight: Tensor) -> Tensor:
        """Distance () of the layer's output, mean over positions' channels taken together."""
        out = x @ weight + self._bias
        return 1 - F.cosine_similarity(out.flatten(), self._y.flatten(), dim=0)


def product_distance(sample: ProductSample, a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of a product of activations, mean over its slices (one head of one picture each)."""
    return (1 - F.cosine_similarity((a @ b).flatten(1) + TINY, sample.y.flatten(1) + TINY, dim=1)).mean()
