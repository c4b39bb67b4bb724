"""The arena: the tensors that hold keys and values, one slot a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arena:
    """``keys`` and ``values``: each ``[layers, kv_heads, slots, head_dim]``.

    Head-major, so that the slots of an extent are one contiguous matrix for each KV head.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def make(
        cls,
        layers: int,
        kv_heads: int,
        head_dim: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Arena:
        """Reserve the memory (the system commits a page of it when it is first written)."""
        shape = (layers, kv_heads, slots, head_dim)
        return cls(
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device),
        )

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` at ``slots`` int64 ``[tokens]``."""
        self.keys[layer].index_copy_(1, slots, k.transpose(0, 1))
        self.values[layer].index_copy_(1, slots, v.transpose(0, 1))


def token_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of KV that one token takes."""
    return 2 * layers * kv_heads * head_dim * dtype.itemsize
