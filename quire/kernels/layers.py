"""The kernels of a layer's work on each row: norms, activations, conversion."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels.native import extension, is_bf16

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """RMS normalisation of each row of ``x`` ``[..., width]``, times ``weight`` (plus one)."""
    width = x.shape[-1]
    assert weight.shape == (width,)
    assert weight.dtype == x.dtype
    rows = x.contiguous()
    out = torch.empty_like(rows)
    extension().rms_norm(
        rows.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        rows.numel() // width,
        width,
        eps,
        1.0 if plus_one else 0.0,
        is_bf16(x),
    )
    return out


def gate(x: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` for ``x`` ``[rows, 2 * width]`` holding gate, then up."""
    return _activated(x, x.shape[1] // 2, activation, gated=True)


def activate(x: Tensor, activation: str) -> Tensor:
    """``act(x)`` for ``x`` ``[rows, width]``."""
    return _activated(x, x.shape[1], activation, gated=False)


def _activated(x: Tensor, width: int, activation: str, *, gated: bool) -> Tensor:
    assert x.is_contiguous()
    out = x.new_empty(x.shape[0], width)
    kind = ACTIVATIONS.index(activation)
    extension().gate(x.data_ptr(), out.data_ptr(), len(x), width, kind, gated, is_bf16(x))
    return out


def widen(x: Tensor) -> Tensor:
    """``x`` in float32."""
    if x.dtype == torch.float32:
        return x
    assert x.is_contiguous()
    out = torch.empty(x.shape, dtype=torch.float32)
    extension().widen(x.data_ptr(), out.data_ptr(), x.numel())
    return out
