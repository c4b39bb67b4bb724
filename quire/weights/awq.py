"""AWQ checkpoints (arXiv 2306.00978) as AutoAWQ writes them, version "gemm".

A 4-bit layer ``[out, in]``:

- ``qweight`` int32 ``[in, out / 8]``: codes of eight neighbouring outputs in a word
- ``qzeros`` int32 ``[groups, out / 8]``, packed alike
- ``scales`` float16 ``[groups, out]``

and weight = scale * (code - zero). From the lowest bits up, a word holds the outputs
0 2 4 6 1 3 5 7 of its eight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.weights import packed
from quire.weights.formats import Matrix
from quire.weights.packed import CODES, FLOATS, Has, Read, Settings, checked, one_of

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the field of a word that holds output 0, 1, ...


def check(config: Settings) -> None:
    """Raises UnsupportedModelError or CheckpointError for a config that cannot be read."""
    version = config.get("version") or config.get("format") or config.get("checkpoint_format")
    one_of(config, "version", str(version or "gemm").lower(), ("gemm",))
    one_of(config, "bits", config.get("bits", 4), (4,))
    packed.group_size(config)


def matrix(read: Read, has: Has, name: str, shape: tuple[int, int], config: Settings) -> Matrix:
    """The matrix ``[out, in]`` of the layer ``name``: `Grouped`, or `Dense` if it has no codes.

    Raises CheckpointError for tensors that do not fit ``shape`` and UnsupportedModelError.
    """
    check(config)
    if not has(f"{name}.qweight"):
        return packed.dense(read, name, shape)
    out, inner = shape
    group = packed.group_size(config)
    group = inner if group == -1 else group
    groups = -(-inner // group)
    packed.whole_words(f"{name}.qweight", out, 4)
    words = checked(read, f"{name}.qweight", (inner, out // 8), CODES)
    zeros = checked(read, f"{name}.qzeros", (groups, out // 8), CODES)
    scales = checked(read, f"{name}.scales", (groups, out), FLOATS)
    return packed.in_groups(_unpack(words).t(), scales.t(), _unpack(zeros).t(), 4, group)


def _unpack(words: Tensor) -> Tensor:
    """int32 ``[rows, n]`` -> uint8 ``[rows, 8 n]`` in the order of outputs."""
    fields = packed.unpack(words, 4).view(len(words), -1, 8)
    return fields.index_select(2, torch.tensor(_PLACES)).flatten(1)
