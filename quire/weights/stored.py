"""Which format a checkpoint's matrices are stored in, by ``quantization_config.quant_method``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quire.errors import CheckpointError, UnsupportedModelError
from quire.weights import awq, compressed, gptq, packed, saved
from quire.weights.formats import Matrix
from quire.weights.packed import Has, Read, Settings

Reader = Callable[[Read, Has, str, tuple[int, int]], Matrix]


@dataclass(frozen=True)
class _Format:
    check: Callable[[Settings], None]
    matrix: Callable[[Read, Has, str, tuple[int, int], Settings], Matrix]


_FORMATS = {
    "awq": _Format(awq.check, awq.matrix),
    "compressed-tensors": _Format(compressed.check, compressed.matrix),
    "gptq": _Format(gptq.check, gptq.matrix),
    saved.METHOD: _Format(saved.check, saved.matrix),
}
_SCALES = (".scales", ".weight_scale")
_ZEROS = (".qzeros", ".weight_zero_point")


def reader(config: Any) -> Reader:
    """What reads the matrix of a layer, given ``read``, ``has``, its name and ``(out, in)``.

    ``config``: quantization_config of config.json, None for a checkpoint without one. Raises
    UnsupportedModelError for another method or an option of it, and CheckpointError.
    """
    if config is None:
        return lambda read, _, name, shape: packed.dense(read, name, shape)
    stored = _format(config)
    stored.check(config)
    return lambda read, has, name, shape: stored.matrix(read, has, name, shape, config)


def held_bytes(name: str, shape: tuple[int, ...], stored: torch.dtype, dtype: torch.dtype) -> int:
    """Bytes that a tensor of a checkpoint takes once loaded, at most.

    Codes stay as they are, scales become float32, and each packed zero a float32 offset.
    """
    size = math.prod(shape)
    if name.endswith(_ZEROS):
        return size * stored.itemsize * 2 * 4
    if not stored.is_floating_point:
        return size * stored.itemsize
    return size * (4 if name.endswith(_SCALES) else dtype.itemsize)


def _format(config: Any) -> _Format:
    if not isinstance(config, dict):
        raise CheckpointError(
            f"quantization_config of config.json is {config!r}.",
            value=config,
            action="Download it again.",
        )
    method = config.get("quant_method")
    if method not in _FORMATS:
        raise UnsupportedModelError(
            f"The checkpoint is quantised ({method}), which is not supported.",
            value=method,
            limit=sorted(_FORMATS),
            action=f"Supported are {', '.join(sorted(_FORMATS))}. "
            "Or use its float16 or bfloat16 version.",
        )
    return _FORMATS[method]
