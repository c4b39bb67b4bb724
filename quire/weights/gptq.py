"""GPTQ checkpoints (arXiv 2210.17323) as AutoGPTQ and GPTQModel write them.

A layer ``[out, in]`` at ``bits`` 4 or 8, with n = 32 / bits codes in a word, lowest bits first:

- ``qweight`` int32 ``[in / n, out]``: n codes of neighbouring inputs in a word
- ``qzeros`` int32 ``[groups, out / n]``: n zeros of neighbouring outputs in a word
- ``scales`` float16 ``[groups, out]``
- ``g_idx`` int32 ``[in]``: the group of each input; absent where neighbours share one

and weight = scale * (code - zero). Format "gptq" stores each word of zeros less one in every
field, "gptq_v2" as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.weights import packed
from quire.weights.formats import Matrix
from quire.weights.packed import CODES, FLOATS, Has, Read, Settings, checked, one_of, setting

_ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class _Layer:
    bits: int
    group: int  # -1: all inputs
    less_one: bool


def check(config: Settings) -> None:
    """Raises UnsupportedModelError or CheckpointError for a config that cannot be read."""
    _settings(config, config)
    for pattern, changes in _overrides(config).items():
        if not pattern.startswith("-"):
            _settings(config, {**config, **changes})


def matrix(read: Read, has: Has, name: str, shape: tuple[int, int], config: Settings) -> Matrix:
    """The matrix ``[out, in]`` of the layer ``name``.

    `Grouped`; `Dense` for a layer without codes and for one whose groups are not neighbours.
    Raises CheckpointError for tensors that do not fit ``shape`` and UnsupportedModelError.
    """
    if not has(f"{name}.qweight"):
        return packed.dense(read, name, shape)
    layer = _layer(config, name)
    out, inner = shape
    bits = layer.bits
    group = inner if layer.group == -1 else layer.group
    groups = -(-inner // group)
    packed.whole_words(f"{name}.qweight", inner, bits)
    packed.whole_words(f"{name}.qzeros", out, bits)
    words = checked(read, f"{name}.qweight", (inner * bits // 32, out), CODES)
    zeros = checked(read, f"{name}.qzeros", (groups, out * bits // 32), CODES)
    scales = checked(read, f"{name}.scales", (groups, out), FLOATS)
    if layer.less_one:
        # The writers subtract one from all fields of a word at once, so a zero of 0 borrows from
        # the next field; adding whole words takes that back, as adding to each field would not.
        zeros = zeros + _ONES[bits]
    index = _index(read, has, name, inner, groups)
    return packed.in_groups(
        packed.unpack(words.t(), bits),
        scales.t(),
        packed.unpack(zeros, bits).t(),
        bits,
        group,
        index,
    )


def _index(read: Read, has: Has, name: str, inner: int, groups: int) -> Tensor | None:
    if not has(f"{name}.g_idx"):
        return None
    index = checked(read, f"{name}.g_idx", (inner,), (torch.int32, torch.int64))
    return packed.group_of_inputs(index, f"{name}.g_idx", groups)


def _settings(config: Settings, layer: Settings) -> _Layer:
    """``layer``: the fields of ``config`` with the changes for one layer."""
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    one_of(config, "checkpoint_format", version, ("gptq", "gptq_v2"))
    one_of(config, "is_marlin_format", bool(config.get("is_marlin_format")), (False,))
    one_of(config, "pack_dtype", config.get("pack_dtype") or "int32", ("int32",))
    bits = setting(layer, "bits", int)
    one_of(config, "bits", bits, _ONES)
    return _Layer(bits, packed.group_size(layer), version == "gptq")


def _overrides(config: Settings) -> dict[str, Settings]:
    """Changes by a pattern of layer names; a "-" before it says that they are not quantised."""
    found: dict[str, Settings] = setting(config, "dynamic", dict, default={})
    return found


def _layer(config: Settings, name: str) -> _Layer:
    for pattern, changes in _overrides(config).items():
        if packed.matches(pattern.removeprefix("+:").removeprefix("-:"), name):
            return _settings(config, {**config, **changes})
    return _settings(config, config)
