"""The arena: the tensors that hold keys and values, one slot a token.

Two layouts with one interface: `Arena`, plain matrices for PyTorch operators, and `TiledArena`, the
tiles that the native kernels read.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.kernels import native
from quire.kernels.kv import PAGE, read_slots, rotate_append


@dataclass(frozen=True)
class Arena:
    """``keys`` and ``values``: each ``[layers, kv_heads, slots, head_dim]``.

    Head-major, so that the slots of an extent are one contiguous matrix for each KV head.
    """

    keys: Tensor
    values: Tensor

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.keys.shape[1]

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

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``slots`` int64 ``[n]``: each ``[kv_heads, n, head_dim]``."""
        return self.keys[layer][:, slots], self.values[layer][:, slots]

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Of each head its own slots int64 ``[rows, kv_heads, n]``: each ``[..., n, head_dim]``."""
        heads = torch.arange(self.kv_heads, device=slots.device)[:, None]
        return self.keys[layer][heads, slots], self.values[layer][heads, slots]

    def forget(self, pages: Iterable[int]) -> None:
        """What ``pages`` hold is not needed any more."""


@dataclass(frozen=True)
class TiledArena:
    """Pages of 16 slots as the kernels multiply them.

    With ``p`` elements in 32 bits (bfloat16: 2, float32: 1), ``keys`` is ``[layers, pages,
    kv_heads, head_dim / p, 16, p]``, a page transposed, and ``values`` ``[layers, pages, kv_heads,
    16 / p, head_dim, p]``, so that neighbours along the inner dimension of a product share a word.
    A page holds all heads, so that few tokens touch little memory.
    """

    keys: Tensor
    values: Tensor

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.keys.shape[2]

    @classmethod
    def make(
        cls, layers: int, kv_heads: int, head_dim: int, slots: int, dtype: torch.dtype
    ) -> TiledArena:
        """Reserve the memory (the system commits a page of it when it is first written).

        Slots never written must hold finite numbers, hence fresh zeros from the system.
        """
        pack = 4 // dtype.itemsize
        shape = (layers, slots // PAGE, kv_heads)
        keys, values = (
            _zeros((*shape, *page, 4)).view(dtype)
            for page in ((head_dim // pack, PAGE), (PAGE // pack, head_dim))
        )
        return cls(keys, values)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store ``k``, ``v`` ``[tokens, kv_heads, head_dim]`` at ``slots`` int64 ``[tokens]``."""
        if native.fits(self.keys):
            k, v = k.contiguous(), v.contiguous()
            keys, values = self.keys[layer], self.values[layer]
            rotate_append(k[:, :0], k, v, None, slots, keys, values)
            return
        page, place, pack = slots // PAGE, slots % PAGE, self.keys.shape[-1]
        self.keys[layer][page, :, :, place] = k.reshape(*k.shape[:2], -1, pack)
        self.values[layer][page, :, place // pack, :, place % pack] = v

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``slots`` int64 ``[n]``: each ``[kv_heads, n, head_dim]``."""
        if native.fits(self.keys):
            return read_slots(self.keys[layer], self.values[layer], slots.contiguous())
        page, place, pack = slots // PAGE, slots % PAGE, self.keys.shape[-1]
        keys = self.keys[layer][page, :, :, place].flatten(2)  # [n, kv_heads, head_dim]
        values = self.values[layer][page, :, place // pack, :, place % pack]
        return keys.transpose(0, 1), values.transpose(0, 1)

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Of each head its own slots int64 ``[rows, kv_heads, n]``: each ``[..., n, head_dim]``."""
        heads = torch.arange(self.kv_heads)[:, None]
        page, place, pack = slots // PAGE, slots % PAGE, self.keys.shape[-1]
        keys = self.keys[layer][page, heads, :, place].flatten(-2)
        return keys, self.values[layer][page, heads, place // pack, :, place % pack]

    def forget(self, pages: Iterable[int]) -> None:
        """Give the memory behind ``pages`` back to the system; they read as zeros then."""
        for first, last in runs_of(pages):
            for tensor in (self.keys, self.values):
                for layer in tensor:
                    _discard(layer[first:last])


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """uint8 zeros, committed in small pages: those of 2 MiB cost more to clear than they save."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(1, math.prod(shape)), flags=flags)
    return torch.from_numpy(np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape))


def runs_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Adjacent numbers as half-open ranges, ascending."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def _discard(part: Tensor) -> None:
    """Drop the system's pages that lie wholly within contiguous private memory."""
    size = mmap.PAGESIZE
    start = -(-part.data_ptr() // size) * size
    stop = (part.data_ptr() + part.nbytes) // size * size
    if stop > start and hasattr(mmap, "MADV_DONTNEED"):
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def token_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of KV that one token takes."""
    return 2 * layers * kv_heads * head_dim * dtype.itemsize
