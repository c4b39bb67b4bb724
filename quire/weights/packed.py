"""What the quantised checkpoint formats share: checked tensors, packed codes, groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from quire.errors import CheckpointError, UnsupportedModelError
from quire.weights.formats import Dense, Grouped

Read = Callable[[str], Tensor]
Has = Callable[[str], bool]
Settings = dict[str, Any]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CODES = (torch.int32,)


def checked(
    read: Read, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """The tensor ``name`` of ``shape`` and one of ``dtypes``. Raises CheckpointError."""
    tensor = read(name)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)} and config.json asks for {list(shape)}.",
            value=tuple(tensor.shape),
            limit=shape,
            action="The weights and config.json, or its quantization_config, do not belong "
            "together: download the checkpoint again.",
        )
    return of_dtype(tensor, name, dtypes)


def of_dtype(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """``tensor``, which must have one of ``dtypes``. Raises CheckpointError."""
    if tensor.dtype not in dtypes:
        listed = " or ".join(_plain(dtype) for dtype in dtypes)
        raise CheckpointError(
            f"{name} has dtype {_plain(tensor.dtype)} where its format has {listed}.",
            value=_plain(tensor.dtype),
            limit=listed,
            action="Write the checkpoint again in the format that config.json names.",
        )
    return tensor


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dense(read: Read, name: str, shape: tuple[int, int]) -> Dense:
    """The matrix of a layer that was left in floating point. Raises CheckpointError."""
    return Dense(checked(read, f"{name}.weight", shape, FLOATS))


def unpack(words: Tensor, bits: int) -> Tensor:
    """``words`` int32 ``[rows, n]`` -> codes uint8 ``[rows, n * 32 / bits]``, lowest bits first.

    ``bits``: 4 or 8.
    """
    packed = words.contiguous().view(torch.uint8)  # lowest byte first, as in safetensors files
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), 2).flatten(1)


def in_groups(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    index: Tensor | None = None,
) -> Grouped | Dense:
    """weight = scale * (code - zero) as a matrix.

    ``codes`` uint8 ``[out, in]``; ``scales`` floating point and ``zeros`` uint8
    ``[out, groups]``, None for ``2**(bits - 1)`` everywhere; ``index`` integers ``[in]``: the
    group of each input, None for ``group`` neighbours each.
    """
    middle = 2 ** (bits - 1)
    inner = codes.shape[1]
    group = min(group, inner)
    scales = scales.float().contiguous()
    offsets = None
    if zeros is not None and bool((zeros != middle).any()):
        offsets = scales * (middle - zeros.float())
    neighbours = torch.arange(inner) // group
    if inner % group == 0 and (index is None or torch.equal(index.long(), neighbours)):
        return Grouped(codes.contiguous(), scales, offsets, bits, group)
    # `Grouped` says only that neighbours share a scale. Where the members of a group lie apart
    # (GPTQ in the order of activations) or the last group is short, the plain matrix is exact.
    of = neighbours if index is None else index.long()
    values = (codes.float() - middle) * scales[:, of]
    if offsets is not None:
        values += offsets[:, of]
    return Dense(values)


def group_of_inputs(index: Tensor, name: str, groups: int) -> Tensor | None:
    """``index`` int32 ``[in]``, or None if it was never filled in. Raises CheckpointError."""
    low, high = (int(value) for value in index.aminmax())
    if high == -1 or (high == 0 and low == 0 and groups > 1):
        return None  # some writers allocate it and leave all at 0 or -1 without a reordering
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"{name} puts inputs into group {high if high >= groups else low} of {groups}.",
            value=high,
            limit=groups,
            action="Download the checkpoint again.",
        )
    return index


def setting(
    config: Settings, field: str, kind: type | tuple[type, ...], default: Any = None
) -> Any:
    """A field of quantization_config, which must be a ``kind``. Raises CheckpointError."""
    value = config.get(field)
    if value is None and default is not None:
        return default
    if isinstance(value, kind) and (not isinstance(value, bool) or kind is bool):
        return value
    raise _wrong(field, value)


def _wrong(field: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"{field} of the quantization_config in config.json is {value!r}.",
        value=value,
        action="Download it again.",
    )


def one_of(config: Settings, field: str, value: object, allowed: Iterable[object]) -> None:
    """Raises UnsupportedModelError unless ``value``, that of ``field``, is in ``allowed``."""
    allowed = tuple(allowed)
    if value not in allowed:
        method = config.get("quant_method")
        listed = ", ".join(repr(a) for a in allowed)
        raise UnsupportedModelError(
            f"Checkpoints quantised by {method} with {field} {value!r} are not supported.",
            value=value,
            limit=allowed,
            action=f"Supported there: {listed}. Or use the float16 or bfloat16 version.",
        )


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression of quantization_config fits the start of ``name``."""
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise CheckpointError(
            f"The pattern {pattern!r} in quantization_config of config.json is not a regular "
            f"expression: {error}.",
            value=pattern,
            action="Download it again.",
        ) from error


def group_size(config: Settings) -> int:
    """Inputs that share a scale; -1: all. Raises CheckpointError."""
    found: int = setting(config, "group_size", int, default=128)
    if found < 1 and found != -1:
        raise _wrong("group_size", found)
    return found


def whole_words(name: str, count: int, bits: int) -> None:
    """Raises CheckpointError unless ``count`` codes fill int32 words."""
    if count * bits % 32:
        raise CheckpointError(
            f"{name} packs {32 // bits} codes in a word, and config.json asks for {count}.",
            value=count,
            limit=32 // bits,
            action="The weights and config.json are of different models.",
        )
