"""Tensors as safetensors, with the memory layout that safetensors does not keep.

Kernels round differently for different layouts, so a model only computes the same bits if its weights lie as they lay.
"""

from __future__ import annotations

from collections.abc import Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor


def pack(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, list[int]]]:
    """Bytes of a safetensors file, the same for the same tensors, and the strides of those not laid out row by row."""
    packed, strides = {}, {}
    for name, tensor in sorted(tensors.items()):
        dense = tensor.detach().cpu().clone()
        packed[name] = dense.clone(memory_format=torch.contiguous_format)
        # not `is_contiguous`, which overlooks axes of one
        if dense.stride() != torch.empty(dense.shape, device="meta").stride():
            strides[name] = list(dense.stride())
    return safetensors.torch.save(packed), strides


def unpack(data: bytes, strides: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The tensors that `pack` took.

    Raises:
        ValueError: if the bytes are no safetensors file, or the strides do not fit.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        for name, stride in strides.items():
            laid_out = torch.empty_strided(tensors[name].shape, stride, dtype=tensors[name].dtype)
            tensors[name] = laid_out.copy_(tensors[name])
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from None
    return tensors
