"""Entries rounded to few bits: the one representation of all stores that round.

A number is ``(code - 2^(bits - 1)) * scale + middle``, with a scale and a middle for each group of
neighbours along tokens or along channels. Codes lie in cells of 16 tokens by 16 channels, as the
native kernels multiply them (`quire/attention/packed.py`); `Packed.read` defines what those
compute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.kv import PAGE
from quire.kv.method import Entries

STEPS = 4  # of a cell's inner dimension, four numbers each
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


@dataclass(frozen=True)
class Format:
    """How keys or values are rounded: to 2, 4 or 8 ``bits``, in groups of ``group``.

    ``along_tokens``: groups are of one channel's tokens, else of one token's channels. ``scales``:
    their dtype, float32, bfloat16, or uint8 for powers of two (block floating point). ``centred``:
    no middles; they are 0.
    """

    bits: int
    group: int
    along_tokens: bool
    scales: torch.dtype
    centred: bool = False

    @property
    def levels(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def half(self) -> int:
        """The code that stands for the middle."""
        return int(2 ** (self.bits - 1))

    @property
    def block(self) -> int:
        """Tokens that whole cells and groups have."""
        return math.lcm(PAGE, self.group) if self.along_tokens else PAGE

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and middles with which ``x`` ``[kv_heads, n, head_dim]`` just fits in the codes.

        ``[kv_heads, n / group, head_dim]`` or ``[kv_heads, n, head_dim / group]``.
        """
        if self.scales == torch.uint8 and not self.centred:
            raise ValueError("Scales that are powers of two are for centred formats.")
        parts = self._groups(x.float())
        axis = self._axis + 1
        if not self.centred:
            low, high = parts.amin(axis), parts.amax(axis)
            scale = ((high - low) / self.levels).to(self.scales)
            return scale, (low + self.half * self.wide(scale)).to(self.scales)
        most = parts.abs().amax(axis)
        if self.scales != torch.uint8:
            return (most / (self.half - 1)).to(self.scales), None
        # The largest number's leading bit is the mantissa's.
        exponent = torch.frexp(most).exponent - 1 - (self.bits - 2)
        return (exponent + 127).clamp(1, 254).masked_fill(most == 0, 0).to(torch.uint8), None

    def encode(self, x: Tensor, scale: Tensor, middle: Tensor | None) -> Tensor:
        """Codes uint8 of ``x``, of its shape; ``scale`` and ``middle`` as `fit` gives them."""
        axis = self._axis + 1
        step = self.wide(scale).clamp(min=2.0**-126).unsqueeze(axis)
        parts = self._groups(x.float())
        if middle is not None:
            parts = parts - middle.float().unsqueeze(axis)
        codes = (parts / step).round() + self.half
        least = 1 if middle is None else 0  # as many below 0 as above
        return codes.clamp(least, self.levels).flatten(axis - 1, axis).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, middle: Tensor | None) -> Tensor:
        """Numbers float32 from codes whose scales and middles are already of their shape."""
        numbers = (codes.float() - self.half) * self.wide(scale)
        return numbers if middle is None else numbers + middle.float()

    def wide(self, scale: Tensor) -> Tensor:
        """Scales as float32."""
        if scale.dtype != torch.uint8:
            return scale.float()
        return (scale.to(torch.int32) << 23).view(torch.float32)

    @property
    def _axis(self) -> int:
        return 1 if self.along_tokens else 2

    def _groups(self, x: Tensor) -> Tensor:
        groups: Tensor = x.unflatten(self._axis, (-1, self.group))
        return groups


@dataclass(frozen=True)
class Codes:
    """The keys or the ``values`` of one layer: ``tokens`` of them, ``dim`` wide, for each KV head.

    ``codes`` uint8 ``[kv_heads, pages, dim / 16, bits / 2, 16, 4]``: cells of 16 columns, tokens of
    keys or channels of values, with 16 numbers each, in ``bits / 2`` rows. Byte i of column c in
    row h holds the numbers ``4 s + i`` of the column for the 8 / bits steps s from ``8 h / bits``
    on, the first in the low bits. ``scale`` and ``middle``: ``[kv_heads, 16 pages / group, dim]``
    where groups lie along tokens, else ``[kv_heads, dim / group, 16 pages]``.
    """

    codes: Tensor
    scale: Tensor
    middle: Tensor | None
    form: Format
    tokens: int
    dim: int
    values: bool

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and middles."""
        return sum(x.nbytes for x in (self.codes, self.scale, self.middle) if x is not None)

    @property
    def pages(self) -> int:
        """Pages of 16 tokens."""
        return self.codes.shape[1]

    @classmethod
    def make(cls, x: Tensor, form: Format, block: int, *, values: bool) -> Codes:
        """Round ``x`` ``[kv_heads, n, dim]``; n is made a multiple of ``block`` with the last."""
        missing = -x.shape[1] % block
        wide = torch.cat([x, x[:, -1:].expand(-1, missing, -1)], dim=1) if missing else x
        scale, middle = form.fit(wide)
        codes = _cells(form.encode(wide, scale, middle), form.bits, values)
        if not form.along_tokens:
            scale = scale.transpose(1, 2).contiguous()
            middle = None if middle is None else middle.transpose(1, 2).contiguous()
        return cls(codes, scale, middle, form, x.shape[1], x.shape[2], values)

    def read(self, index: Tensor | None = None) -> Tensor:
        """The numbers again, float32: all, or those of ``index``; see `Stored.read`."""
        if index is None:
            return self._all()[:, : self.tokens]
        heads = torch.arange(len(self.codes), device=index.device)[:, None]
        page, place = index // PAGE, index % PAGE
        per = 8 // self.form.bits
        mask = self.form.levels
        if self.values:
            step, inner = place // STEPS, place % STEPS
            found = self.codes[heads, page, :, step // per, :, inner].flatten(-2)
            codes = found >> (step % per * self.form.bits)[..., None].to(torch.uint8) & mask
        else:
            found = self.codes[heads, page, :, :, place]  # [..., k, dim / 16, bits / 2, 4]
            shift = torch.arange(0, 8, self.form.bits, dtype=torch.uint8, device=found.device)
            codes = (found[..., None, :] >> shift[:, None] & mask).flatten(-4)
        codes = codes[..., : self.dim]
        middle = None if self.middle is None else self._spread(self.middle, heads, index)
        return self.form.decode(codes, self._spread(self.scale, heads, index), middle)

    def _all(self) -> Tensor:
        """All numbers of all pages, without an index: the bulk of what PyTorch reads."""
        mask, bits = self.form.levels, self.form.bits
        shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=self.codes.device)
        places = self.codes[..., None, :, :] >> shift[:, None, None] & mask
        # [kv_heads, pages, dim / 16, bits / 2, 8 / bits, columns, 4] -> [kv_heads, tokens, dim]
        order = (0, 1, 3, 4, 6, 2, 5) if self.values else (0, 1, 5, 2, 3, 4, 6)
        codes = places.permute(order).flatten(-2 if self.values else -4).flatten(1, -2)

        def groups(x: Tensor) -> Tensor:
            return (x if self.form.along_tokens else x.transpose(1, 2)).unsqueeze(axis)

        axis = 2 if self.form.along_tokens else 3
        parts = codes[..., : self.dim].unflatten(axis - 1, (-1, self.form.group))
        middle = None if self.middle is None else groups(self.middle)
        return self.form.decode(parts, groups(self.scale), middle).flatten(axis - 1, axis)

    def _spread(self, numbers: Tensor, heads: Tensor, index: Tensor) -> Tensor:
        """Scales or middles for every channel of the entries ``index``."""
        if self.form.along_tokens:
            return numbers[heads, index // self.form.group]
        return numbers[heads, :, index].repeat_interleave(self.form.group, -1)

    def address(self) -> list[int]:
        """What the kernels must know: see ``CodedSide`` in kernels.h."""
        middle = 0 if self.middle is None else self.middle.data_ptr()
        form = self.form
        return [
            self.pages,
            self.codes.data_ptr(),
            self.scale.data_ptr(),
            middle,
            form.bits,
            form.group,
            int(form.along_tokens),
            _KINDS[form.scales],
        ]

    @property
    def tiled(self) -> bool:
        """Whether groups are made of whole cells, as the kernels need it."""
        return self.dim % PAGE == 0 and self.form.group % PAGE == 0


def _cells(codes: Tensor, bits: int, values: bool) -> Tensor:
    """Codes uint8 ``[kv_heads, n, dim]`` in cells; n is a multiple of 16."""
    heads, n, dim = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -dim % PAGE))
    cells = padded.view(heads, n // PAGE, PAGE, -1, PAGE).transpose(2, 3)
    if values:
        cells = cells.transpose(3, 4)  # [kv_heads, pages, dim / 16, columns, inner]
    parts = cells.unflatten(-1, (bits // 2, 8 // bits, STEPS))
    packed: Tensor = parts[..., 0, :].clone()
    for place in range(1, 8 // bits):
        packed |= parts[..., place, :] << (place * bits)
    return packed.transpose(-2, -3).contiguous()  # rows before columns


@dataclass(frozen=True)
class Packed:
    """Keys and values of all layers as codes; a `quire.kv.method.Stored`.

    ``positions`` int32 ``[kv_heads, n]`` a layer, or the position of the first entry where they are
    those of neighbours. ``key_back`` and ``value_back`` ``[kv_heads, head_dim, head_dim]`` a layer
    are what codes' numbers are multiplied with to be keys or values (a rotation, a balancer); the
    method's own, not counted here.
    """

    keys: tuple[Codes, ...]
    values: tuple[Codes, ...]
    positions: tuple[Tensor, ...] | int
    key_back: tuple[Tensor, ...] | None = None
    value_back: tuple[Tensor, ...] | None = None

    @classmethod
    def make(
        cls,
        layers: Sequence[Entries],
        keys: Format,
        values: Format,
        key_back: tuple[Tensor, ...] | None = None,
        value_back: tuple[Tensor, ...] | None = None,
    ) -> Packed:
        """Round entries without biases; keys and values already turned where they are to be."""
        block = math.lcm(keys.block, values.block)
        return cls(
            tuple(Codes.make(e.keys, keys, block, values=False) for e in layers),
            tuple(Codes.make(e.values, values, block, values=True) for e in layers),
            pack_positions(layers),
            key_back,
            value_back,
        )

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        codes = sum(codes.nbytes for codes in (*self.keys, *self.values))
        return codes + position_bytes(self.positions)

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """See `Stored.read`."""
        keys, values = self.keys[layer].read(index), self.values[layer].read(index)
        if self.key_back is not None:
            keys = keys @ self.key_back[layer].float()
        if self.value_back is not None:
            values = values @ self.value_back[layer].float()
        positions = read_positions(self.positions, layer, index, values)
        return Entries(keys, values, positions)

    @functools.cached_property
    def addresses(self) -> NDArray[np.int64] | None:
        """Where the kernels find it, int64 ``[layers, 2, 8]``; None where they cannot read it."""
        sides = list(zip(self.keys, self.values, strict=True))
        if not all(codes.tiled for both in sides for codes in both):
            return None
        return np.array([[codes.address() for codes in both] for both in sides], dtype=np.int64)


def pack_positions(layers: Sequence[Entries]) -> tuple[Tensor, ...] | int:
    """Positions int32 ``[kv_heads, n]`` of each layer, or the first where they are neighbours'."""
    first = int(layers[0].positions[0, 0])
    every = torch.arange(first, first + len(layers[0]), device=layers[0].positions.device)
    if all(torch.equal(e.positions, every.expand(e.positions.shape)) for e in layers):
        return first
    return tuple(e.positions.to(torch.int32) for e in layers)


def read_positions(
    positions: tuple[Tensor, ...] | int, layer: int, index: Tensor | None, like: Tensor
) -> Tensor:
    """What `pack_positions` gave, int64: all, or those of ``index``; ``like`` ``[..., n, dim]``."""
    if isinstance(positions, int):
        every = torch.arange(like.shape[-2], device=like.device).expand(like.shape[:-1])
        return positions + (every if index is None else index)
    known = positions[layer].long()
    return known if index is None else known[torch.arange(len(known))[:, None], index]


def position_bytes(known: tuple[Tensor, ...] | int) -> int:
    """Bytes that `pack_positions`' result takes."""
    return 0 if isinstance(known, int) else sum(positions.nbytes for positions in known)
