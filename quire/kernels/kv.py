"""The tiles that hold KV: their size, and kernels that write and read them."""

from __future__ import annotations

from torch import Tensor

from quire.kernels.native import address, extension, is_bf16

PAGE = 16  # tokens of a tile of keys or values


def rotate_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Rotate q and k in place and store k and v in tiles of the arena, in one pass.

    ``q`` ``[tokens, heads, head_dim]``, ``k``, ``v`` ``[tokens, kv_heads, head_dim]``, tokens any
    distance apart; ``rotation``: cosines and sines float32 ``[tokens, rotated / 2]``; ``slots``
    int64 ``[tokens]``; ``keys``, ``values``: one layer of a `TiledArena`.
    """
    tokens, heads, head_dim = q.shape
    for part in (q, k, v):
        assert part.stride(2) == 1
        assert part.stride(1) == head_dim
        assert part.dtype == keys.dtype
    assert slots.shape == (tokens,)
    assert slots.is_contiguous()
    cos, sin = rotation if rotation is not None else (None, None)
    extension().rotate_append(
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        address(cos),
        address(sin),
        0 if cos is None else 2 * cos.shape[1],
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        tokens,
        heads,
        k.shape[1],
        head_dim,
        is_bf16(q),
    )


def read_slots(keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[kv_heads, n, head_dim]`` in ``slots`` int64 ``[n]``.

    ``keys``, ``values``: one layer of a `TiledArena`.
    """
    _, kv_heads, steps, _, pack = keys.shape
    assert slots.is_contiguous()
    assert not len(slots) or int(slots.max()) < len(keys) * PAGE
    k, v = keys.new_empty(2, kv_heads, len(slots), steps * pack)
    extension().read_slots(
        keys.data_ptr(),
        values.data_ptr(),
        slots.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        len(slots),
        kv_heads,
        steps * pack,
        is_bf16(keys),
    )
    return k, v
