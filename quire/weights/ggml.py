"""The block formats of GGUF files: bytes of a row to codes, scales and offsets.

A row is a sequence of blocks of 32 or 256 weights, each with its own scales. What a block means is
defined by ggml; here every format becomes a `Grouped` matrix, in whole-matrix operations. Formats
of 5 and 6 bits are held in 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.weights.formats import Grouped


@dataclass(frozen=True)
class BlockFormat:
    """``decode`` takes uint8 ``[out, blocks, size]``, where a block holds ``weights`` weights."""

    weights: int
    size: int
    decode: Callable[[Tensor], Grouped]


def grouped(kind: str, rows: Tensor) -> Grouped:
    """The matrix that uint8 ``rows`` ``[out, bytes]`` of the format ``kind`` stand for."""
    block = FORMATS[kind]
    return block.decode(rows.reshape(rows.shape[0], -1, block.size))


def held_bytes(kind: str, weights: int) -> int:
    """Bytes of ``weights`` weights as codes, float32 scales and offsets."""
    block = FORMATS[kind]
    one = grouped(kind, torch.zeros(1, block.size, dtype=torch.uint8))
    numbers = one.scales.numel() * (1 if one.offsets is None else 2)
    return (block.weights * one.bits // 8 + 4 * numbers) * weights // block.weights


def dequantise(kind: str, rows: Tensor, step: int = 1024) -> Tensor:
    """float32 ``[out, in]``, ``step`` rows at a time: the parts in between are larger still."""
    block = FORMATS[kind]
    out = torch.empty(rows.shape[0], rows.shape[1] // block.size * block.weights)
    for start in range(0, rows.shape[0], step):
        out[start : start + step] = grouped(kind, rows[start : start + step]).dequantise()
    return out


def _split(blocks: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return blocks.reshape(*blocks.shape[:-1], *sizes)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at`` of each block, as float32 ``[out, blocks]``."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0].float()


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves of all bytes of a run, then the high ones: ``[..., n]`` -> ``[..., 2, n]``."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _bits(packed: Tensor) -> Tensor:
    """The bits of bytes, lowest first: ``[..., n]`` -> ``[..., 8 * n]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & 1).flatten(-2)


def _q8_0(blocks: Tensor) -> Grouped:
    codes = blocks[..., 2:] ^ 128  # int8 to the same number plus 128
    return Grouped(codes.flatten(1), _half(blocks, 0), None, bits=8, group=32)


def _q4_0(blocks: Tensor) -> Grouped:
    codes = _nibbles(blocks[..., 2:])
    return Grouped(codes.flatten(1), _half(blocks, 0), None, bits=4, group=32)


def _q4_1(blocks: Tensor) -> Grouped:
    scales = _half(blocks, 0)
    codes = _nibbles(blocks[..., 4:])
    return Grouped(codes.flatten(1), scales, _half(blocks, 2) + 8 * scales, bits=4, group=32)


def _q5_0(blocks: Tensor) -> Grouped:
    codes = _nibbles(blocks[..., 6:]).flatten(-2) | _bits(blocks[..., 2:6]) << 4
    return Grouped((codes + 112).flatten(1), _half(blocks, 0), None, bits=8, group=32)


def _q5_1(blocks: Tensor) -> Grouped:
    codes = _nibbles(blocks[..., 8:]).flatten(-2) | _bits(blocks[..., 4:8]) << 4
    return Grouped((codes | 128).flatten(1), _half(blocks, 0), _half(blocks, 2), bits=8, group=32)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """What each of the 8 groups of a block of Q4_K or Q5_K is multiplied by and lowered by.

    Both are 6-bit numbers. Bytes 4 to 7 hold the first four scales and, in their top bits, parts of
    the last four; bytes 8 to 11 the same for minima; bytes 12 to 15 the rest of the last four.
    """
    first, second, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), dim=-1)
    return (
        (_half(blocks, 0)[..., None] * scales.float()).flatten(1),
        (_half(blocks, 2)[..., None] * minima.float()).flatten(1),
    )


def _q4_k(blocks: Tensor) -> Grouped:
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(_split(blocks[..., 16:], 4, 32))
    return Grouped(codes.flatten(1), scales, 8 * scales - minima, bits=4, group=32)


def _q5_k(blocks: Tensor) -> Grouped:
    scales, minima = _scales_and_minima(blocks)
    low = _nibbles(_split(blocks[..., 48:], 4, 32)).flatten(-3, -2)  # [..., 8, 32]
    groups = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    high = blocks[..., None, 16:48] >> groups & 1  # bit g of a byte belongs to group g
    return Grouped((low | high << 4 | 128).flatten(1), scales, -minima, bits=8, group=32)


def _q6_k(blocks: Tensor) -> Grouped:
    low = _split(blocks[..., :128], 2, 2, 32)
    low = torch.cat((low & 15, low >> 4), dim=-2)  # [..., 2, 4, 32]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = _split(blocks[..., 128:192], 2, 1, 32) >> shifts & 3
    scales = _half(blocks, 208)[..., None] * blocks[..., 192:208].view(torch.int8).float()
    codes = (low | high << 4) + 96  # a 6-bit code is lowered by 32, one of 8 bits by 128
    return Grouped(codes.flatten(1), scales.flatten(1), None, bits=8, group=16)


FORMATS = {
    "Q4_0": BlockFormat(32, 18, _q4_0),
    "Q4_1": BlockFormat(32, 20, _q4_1),
    "Q5_0": BlockFormat(32, 22, _q5_0),
    "Q5_1": BlockFormat(32, 24, _q5_1),
    "Q8_0": BlockFormat(32, 34, _q8_0),
    "Q4_K": BlockFormat(256, 144, _q4_k),
    "Q5_K": BlockFormat(256, 176, _q5_k),
    "Q6_K": BlockFormat(256, 210, _q6_k),
}
