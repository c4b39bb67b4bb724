"""Which format a checkpoint's matrices are stored in, by ``quantization_config.quant_method``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quire.errors import CheckpointError, UnsupportedModelError
from quire.weights import awq, compressed, gptq, packed
from quire.weights.formats import Matrix
from quire.weights.packed import Has, Read, Settings

Reader = Callable[[Read, Has, str, tuple[int, int]], Matrix]


@dataclass(frozen=True)
class _Format:
    check: Callable[[Settings], None]
    bits: Callable[[Settings, str], int]
    matrix: Callable[[Read, Has, str, tuple[int, int], Settings], Matrix]


_FORMATS = {
    "awq": _Format(awq.check, awq.packed_bits, awq.matrix),
    "compressed-tensors": _Format(compressed.check, compressed.packed_bits, compressed.matrix),
    "gptq": _Format(gptq.check, gptq.packed_bits, gptq.matrix),
}
_PACKED = (".qweight", ".weight_packed")
_BESIDE = (
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight_g_idx",
)


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


def count(shapes: Mapping[str, tuple[int, ...]], config: Any) -> int:
    """How many weights tensors of these names and shapes stand for, last words counted as full.

    Scales, zeros and the like beside packed codes are not counted.
    """
    total = 0
    for name, shape in shapes.items():
        size = 1
        for width in shape:
            size *= width
        if config is not None and name.endswith(_PACKED):
            size = size * 32 // _format(config).bits(config, name.rpartition(".")[0])
        if config is None or not name.endswith(_BESIDE):
            total += size
    return total


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
