"""The kernels of attention: over tiles of KV, over chosen entries of tiles, over packed entries."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.native import address, extension, is_bf16


def make_plan(*arguments: object) -> object:
    """An attention plan; the arguments are explained in `quire/attention/native.py`."""
    return extension().make_plan(*arguments)


def attend(
    plan: object,
    layer: int,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of ``q`` ``[tokens, heads, head_dim]`` over a plan's reads of one layer's tiles.

    ``lse`` float32 ``[tokens, heads]`` receives the log of each sum of exp(scores).
    """
    assert q.stride(2) == 1
    assert q.stride(1) == q.shape[2]
    assert q.dtype == keys.dtype
    out = torch.empty(q.shape, dtype=q.dtype)
    extension().attend(
        plan,
        layer,
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        scale,
        softcap or 0.0,
        address(lse),
        is_bf16(q),
    )
    return out


def choose_chunks(reads: NDArray[np.int64], q: Tensor, kv_heads: int, scale: float) -> None:
    """Write which chunks of neighbours the rows of a step read of each segment, ascending.

    ``q`` ``[rows, heads, head_dim]``; ``reads`` int64 ``[reads, 8]`` is explained at ``ChooseRead``
    in kernels.h. A chunk is as good as the largest share of a softmax over the chunks that a query
    head of its KV head gives.
    """
    _, heads, head_dim = q.shape
    assert q.stride(2) == 1
    assert q.stride(1) == head_dim
    assert reads.ndim == 2
    assert reads.shape[1] == 8
    extension().choose(
        reads,
        q.data_ptr(),
        q.stride(0),
        kv_heads,
        heads // kv_heads,
        head_dim,
        scale,
        is_bf16(q),
    )


def attend_chosen(
    reads: NDArray[np.int64],
    q: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    """Merge attention over chosen entries of one layer's tiles into ``out`` and ``lse``.

    ``reads`` int64 ``[reads, 10]`` is explained at ``FetchRead`` in kernels.h; rows stand at
    ``positions`` int64 ``[rows]``; the rest as in `attend_packed`, which see.
    """
    _check_results(q, out, lse)
    assert q.dtype == keys.dtype
    assert reads.ndim == 2
    assert reads.shape[1] == 10
    assert positions.shape == (len(q),)
    assert positions.dtype == torch.int64
    assert positions.is_contiguous()
    kv_heads = keys.shape[1]
    extension().attend_chosen(
        reads,
        q.data_ptr(),
        q.stride(0),
        positions.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        kv_heads,
        q.shape[1] // kv_heads,
        q.shape[2],
        window or 0,
        scale,
        softcap or 0.0,
        is_bf16(q),
    )


def make_packed_plan(*arguments: object) -> object:
    """A plan over packed entries; the arguments are explained in `quire/attention/packed.py`."""
    return extension().make_packed_plan(*arguments)


def attend_packed(
    plan: object,
    layer: int,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Merge attention of ``q`` ``[tokens, heads, head_dim]`` over a plan's packed entries into it.

    ``out`` float32 ``[tokens, heads, head_dim]`` holds normalised results, ``lse`` float32
    ``[tokens, heads]`` the logs of their weights' sums.
    """
    _check_results(q, out, lse)
    extension().attend_packed(
        plan,
        layer,
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        lse.data_ptr(),
        scale,
        softcap or 0.0,
        is_bf16(q),
    )


def _check_results(q: Tensor, out: Tensor, lse: Tensor) -> None:
    assert q.stride(2) == 1
    assert q.stride(1) == q.shape[2]
    for result in (out, lse):
        assert result.dtype == torch.float32
        assert result.is_contiguous()
    assert out.shape == q.shape
    assert lse.shape == q.shape[:2]
