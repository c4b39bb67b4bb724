"""The kernels of sampling, over float32 logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.native import extension


def argmax(logits: Tensor) -> Tensor:
    """The first largest of each row of float32 ``[rows, vocab]``: int64 ``[rows]``."""
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    chosen = torch.empty(logits.shape[0], dtype=torch.int64)
    extension().argmax(logits.data_ptr(), *logits.shape, chosen.data_ptr())
    return chosen


def sample(
    logits: Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    draws: Tensor,
) -> Tensor:
    """One token a row of float32 ``[rows, vocab]``; see `quire/decode/sampling.py`."""
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    options = [torch.tensor(v, dtype=torch.float32) for v in (temperature, top_p, min_p)]
    ranks = torch.tensor(top_k, dtype=torch.int64)
    chosen = torch.empty(logits.shape[0], dtype=torch.int64)
    extension().sample(
        logits.data_ptr(),
        *logits.shape,
        *(option.data_ptr() for option in options),
        ranks.data_ptr(),
        draws.data_ptr(),
        chosen.data_ptr(),
    )
    return chosen


def mask(logits: Tensor, rows: Sequence[int], masks: NDArray[np.int32]) -> None:
    """Set logits to -inf where a row's bit is 0; see `quire/decode/sampling.py`.

    ``logits`` float32 ``[.., vocab]``; ``rows`` distinct; ``masks`` ``[rows, words]``, the lowest
    bit of a word first, with a bit for every column at least.
    """
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    assert masks.flags.c_contiguous
    assert masks.shape[0] == len(rows)
    assert masks.shape[1] * 32 >= logits.shape[1]
    at = torch.tensor(rows, dtype=torch.int64)
    extension().mask(
        logits.data_ptr(), logits.shape[1], at.data_ptr(), masks.ctypes.data, *masks.shape
    )
