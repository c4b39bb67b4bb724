"""Quantised weights as Quire writes them (`quire convert`), so that the next start is fast.

Beside ``model.safetensors`` tensors of other kinds, a layer ``[out, in]`` has either

- ``values`` int8 ``[out, in]`` and ``scales`` float32 ``[out]`` (`ByChannel`), or
- ``codes4`` uint8 ``[out, in / 2]`` (the first of two inputs in the low half) or ``codes8`` uint8
  ``[out, in]``, ``scales`` float32 ``[out, groups]`` and perhaps ``offsets`` (`Grouped`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.errors import CheckpointError
from quire.weights import packed
from quire.weights.formats import ByChannel, Dense, Grouped, Matrix
from quire.weights.packed import Has, Read, Settings

METHOD = "quire"


def tensors(name: str, matrix: Matrix) -> dict[str, Tensor]:
    """The tensors that stand for the layer ``name``."""
    match matrix:
        case Dense():
            return {f"{name}.weight": matrix.values}
        case ByChannel():
            return {f"{name}.values": matrix.values, f"{name}.scales": matrix.scales}
        case Grouped():
            codes = matrix.codes
            if matrix.bits == 4:
                codes = codes[:, ::2] | codes[:, 1::2] << 4
            found = {f"{name}.codes{matrix.bits}": codes, f"{name}.scales": matrix.scales}
            if matrix.offsets is not None:
                found[f"{name}.offsets"] = matrix.offsets
            return found


def check(config: Settings) -> None:
    """Raises CheckpointError for a version that this Quire does not know."""
    if config.get("version") != 1:
        raise CheckpointError(
            f"The checkpoint was converted in version {config.get('version')!r} of the format.",
            value=config.get("version"),
            limit=1,
            action="Convert the original again with this version of quire.",
        )


def matrix(read: Read, has: Has, name: str, shape: tuple[int, int], config: Settings) -> Matrix:  # noqa: ARG001
    """The matrix ``[out, in]`` of the layer ``name``. Raises CheckpointError."""
    if has(f"{name}.values"):
        found: Matrix = ByChannel(read(f"{name}.values"), read(f"{name}.scales"))
    elif has(f"{name}.codes4") or has(f"{name}.codes8"):
        found = _grouped(read, has, name)
    else:
        return packed.dense(read, name, shape)
    if found.shape != shape:
        raise CheckpointError(
            f"{name} has shape {list(found.shape)} and config.json asks for {list(shape)}.",
            value=found.shape,
            limit=shape,
            action="Convert the original again.",
        )
    return found


def _grouped(read: Read, has: Has, name: str) -> Grouped:
    bits = 4 if has(f"{name}.codes4") else 8
    codes = read(f"{name}.codes{bits}")
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
    scales = read(f"{name}.scales")
    offsets = read(f"{name}.offsets") if has(f"{name}.offsets") else None
    return Grouped(codes, scales, offsets, bits, codes.shape[1] // scales.shape[1])
