"""The kernels of matrix products: dense, int8 and grouped weights in tiles of 16 outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quire.kernels.native import address, extension, is_bf16


def tiles(weight: Tensor, pack: int) -> Tensor:
    """``[outs, ins]`` as ``[outs / 16, ins / pack, 16, pack]``, outs padded with zeros."""
    outs, ins = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -outs % 16))
    return padded.view(-1, 16, ins // pack, pack).transpose(1, 2).contiguous()


def dense(x: Tensor, weight: Tensor, outs: int, bias: Tensor | None, add: Tensor | None) -> Tensor:
    """``x W^T + bias + add`` for ``weight`` packed by `tiles`; ``x`` ``[rows, in]``."""
    out = x.new_empty(x.shape[0], outs)
    extension().dense(*_product(x, out, bias, add), weight.data_ptr())
    return out


def int8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    sums: Tensor,
    outs: int,
    bias: Tensor | None,
    add: Tensor | None,
) -> Tensor:
    """The same for int8 tiles; each row of ``x`` is rounded to int8 on the way."""
    out = x.new_empty(x.shape[0], outs)
    extension().int8(
        *_product(x, out, bias, add), weight.data_ptr(), scales.data_ptr(), sums.data_ptr()
    )
    return out


def grouped(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bits: int,
    group: int,
    outs: int,
    bias: Tensor | None,
    add: Tensor | None,
    *,
    few: bool = True,
) -> Tensor:
    """The same for grouped codes.

    ``few`` lets up to 32 rows in bfloat16 be rounded to 8 bits in blocks of 32 inputs, of which
    groups must consist.
    """
    out = x.new_empty(x.shape[0], outs)
    extension().grouped(
        *_product(x, out, bias, add),
        weight.data_ptr(),
        scales.data_ptr(),
        address(offsets),
        bits,
        group,
        few,
    )
    return out


def _product(
    x: Tensor, out: Tensor, bias: Tensor | None, add: Tensor | None
) -> tuple[int, int, int, int, int, int, int, int, bool]:
    rows, ins = x.shape
    outs = out.shape[1]
    assert x.stride(1) == 1
    assert x.stride(0) % 4 == 0
    assert x.data_ptr() % 4 == 0
    assert bias is None or (bias.shape == (outs,) and bias.dtype == x.dtype)
    assert add is None or (add.shape == out.shape and add.dtype == x.dtype and add.is_contiguous())
    return (
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        address(bias),
        address(add),
        rows,
        ins,
        outs,
        is_bf16(x),
    )


@dataclass(frozen=True)
class Weights:
    """What `dense`, `int8` or `grouped` (``kind``) multiplies with: arguments of theirs."""

    kind: Literal["dense", "int8", "grouped"]
    weight: Tensor
    ins: int
    outs: int
    scales: Tensor | None = None
    offsets: Tensor | None = None
    sums: Tensor | None = None
    bits: int = 0
    group: int = 0
    few: bool = False

    def numbers(self, bias: Tensor | None) -> list[int]:
        """As ``linear`` in module.cpp reads them."""
        return [
            ("dense", "int8", "grouped").index(self.kind),
            self.weight.data_ptr(),
            address(self.scales),
            address(self.offsets),
            address(self.sums),
            address(bias),
            self.ins,
            self.outs,
            self.bits,
            self.group,
            self.few,
        ]
