"""The joint of KV methods: what a method is given, and what it gives back.

A method works on one of five axes. `Select` decides which entries a sequence keeps (or merges),
`Store` how entries are represented, `Fetch` which of them a decoding query reads, `Sparse` which a
prompt's chunk reads, `Shorten` which of a prompt's tokens are computed. The engine knows these
protocols and nothing of the methods; see ``docs/kv.md``.

An **entry** is a key and a value of one KV head: of one token, or of several merged into one.
Keys are rotated (post-RoPE) wherever they cross this joint; a method that wants them otherwise
turns them back with `Facts.unrotate`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Made = TypeVar("Made")


@dataclass(frozen=True)
class Entries:
    """What the KV heads of one layer hold, or a part of it.

    ``keys``, ``values`` ``[kv_heads, n, head_dim]``; ``positions`` int64 ``[kv_heads, n]``.
    ``bias`` float32 ``[kv_heads, n]`` is added to the scaled scores (the log of how many tokens an
    entry stands for, where a method wants that). ``count`` int64 ``[kv_heads]``: leading entries
    that are valid; None means all. Gathered for each row, all have a leading ``[rows]``.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    bias: Tensor | None = None
    count: Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[-2]

    def part(self, start: int, stop: int) -> Entries:
        """Entries ``[start, stop)`` of every head."""
        return Entries(
            self.keys[..., start:stop, :],
            self.values[..., start:stop, :],
            self.positions[..., start:stop],
            None if self.bias is None else self.bias[..., start:stop],
            None if self.count is None else (self.count - start).clamp(0, stop - start),
        )

    def take(self, index: Sequence[Tensor]) -> Entries:
        """The entries ``index[h]`` (int64, any number) of each head h, padded to one length."""
        return pad(
            [
                Entries(
                    self.keys[h : h + 1, i],
                    self.values[h : h + 1, i],
                    self.positions[h : h + 1, i],
                    None if self.bias is None else self.bias[h : h + 1, i],
                )
                for h, i in enumerate(index)
            ]
        )

    def head(self, h: int) -> Entries:
        """The valid entries of head ``h`` alone."""
        count = len(self) if self.count is None else int(self.count[h])
        one = slice(h, h + 1)
        return Entries(
            self.keys[one, :count],
            self.values[one, :count],
            self.positions[one, :count],
            None if self.bias is None else self.bias[one, :count],
        )

    def widened(self, size: int) -> Entries:
        """The same with ``size`` entries a head, the added ones not counted."""
        return pad([self.head(h) for h in range(len(self.keys))], size)


def pad(heads: Sequence[Entries], size: int = 0) -> Entries:
    """One head each (no ``count``) as one, of at least ``size`` entries; short heads repeat."""
    longest = max(size, *(len(head) for head in heads))

    def widen(x: Tensor) -> Tensor:
        if x.shape[1] == longest:
            return x
        last = x[:, -1:] if x.shape[1] else x.new_zeros(1, 1, *x.shape[2:])
        return torch.cat([x, last.expand(-1, longest - x.shape[1], *x.shape[2:])], dim=1)

    count = torch.tensor([len(head) for head in heads])
    return Entries(
        torch.cat([widen(head.keys) for head in heads]),
        torch.cat([widen(head.values) for head in heads]),
        torch.cat([widen(head.positions) for head in heads]),
        None
        if all(head.bias is None for head in heads)
        else torch.cat([widen(_bias(head)) for head in heads]),
        None if bool((count == longest).all()) else count,
    )


def join(parts: Sequence[Entries]) -> Entries:
    """Parts of one layer, one after the other; what is not counted is left out."""
    if len(parts) == 1:
        return parts[0]
    if any(part.count is not None for part in parts[:-1]):
        heads = range(len(parts[0].keys))
        return pad([join([part.head(h) for part in parts]) for h in heads])
    before = sum(len(part) for part in parts[:-1])
    count = parts[-1].count
    return Entries(
        torch.cat([part.keys for part in parts], dim=1),
        torch.cat([part.values for part in parts], dim=1),
        torch.cat([part.positions for part in parts], dim=1),
        None
        if all(part.bias is None for part in parts)
        else torch.cat([_bias(part) for part in parts], dim=1),
        None if count is None else count + before,
    )


def _bias(part: Entries) -> Tensor:
    return part.bias if part.bias is not None else torch.zeros(part.positions.shape)


@dataclass(frozen=True)
class Calibration:
    """What the model computed over a short text. Each a list with one tensor a layer.

    ``queries`` ``[tokens, heads, head_dim]``, ``keys`` and ``values`` ``[tokens, kv_heads,
    head_dim]``, all before rotation, float32.
    """

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


def _no_tokenizer() -> None:
    return None


@dataclass(frozen=True)
class Facts:
    """What methods may know of the model.

    ``turn(layer, x, positions, back)`` rotates ``x`` ``[..., n, head_dim]`` at ``positions`` int64
    (that broadcast to ``[..., n]``) as the layer's RoPE does, or turns it back. ``calibrate`` gives
    a `Calibration` (computed once). ``windows``: of each layer, None where it sees everything.
    ``softcap`` bounds the scaled scores: ``softcap * tanh(score / softcap)``. ``sentence_ends``
    tells which tokens end a sentence, bool ``[vocab]`` (computed once), or None if nobody knows.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    windows: tuple[int | None, ...]
    turn: Callable[[int, Tensor, Tensor, bool], Tensor]
    calibrate: Callable[[], Calibration]
    softcap: float | None = None
    sentence_ends: Callable[[], Tensor | None] = _no_tokenizer
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    def rotate(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """Apply RoPE to ``x`` ``[..., n, head_dim]`` at ``positions``."""
        return self.turn(layer, x, positions, False)

    def unrotate(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """Take RoPE back from ``x`` ``[..., n, head_dim]`` at ``positions``."""
        return self.turn(layer, x, positions, True)

    def once(self, make: Callable[..., Made], *options: Hashable) -> Made:
        """``make(facts, *options)``, the same object every time: what calibration gives a method.

        It lives as long as the facts.
        """
        key = (make, options)
        if key not in self._made:
            self._made[key] = make(self, *options)
        made: Made = self._made[key]
        return made


class Stored(Protocol):
    """Packed entries of all layers; immutable."""

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM, everything counted."""
        ...

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """All entries of a layer, float32 or the model's dtype.

        With ``index`` int64 ``[rows, kv_heads, k]``, those alone: ``[rows, kv_heads, k, ...]``.
        """
        ...


@dataclass(frozen=True)
class Plain:
    """Entries as they are: of all layers, as many in each."""

    layers: tuple[Entries, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        tensors = [t for e in self.layers for t in (e.keys, e.values, e.positions, e.bias)]
        return sum(t.nbytes for t in tensors if t is not None)

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """All entries of a layer, or those of ``index``; see `Stored.read`."""
        entries = self.layers[layer]
        return entries if index is None else gather(entries, index)


def gather(entries: Entries, index: Tensor) -> Entries:
    """The entries ``index`` int64 ``[rows, kv_heads, k]`` for each row."""
    heads = torch.arange(index.shape[1])[:, None]
    return Entries(
        entries.keys[heads, index],
        entries.values[heads, index],
        entries.positions[heads, index],
        None if entries.bias is None else entries.bias[heads, index],
    )


@dataclass(frozen=True)
class Joined:
    """Stored ``parts`` one after the other, of ``sizes`` entries a head; none has biases.

    Attention reads each part in its own way.
    """

    parts: tuple[Stored, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return sum(part.nbytes for part in self.parts)

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """All entries of a layer, or those of ``index``; see `Stored.read`."""
        if index is None:
            return join([part.read(layer) for part in self.parts])
        first = 0
        found: Entries | None = None
        for part, size in zip(self.parts, self.sizes, strict=True):
            more = part.read(layer, (index - first).clamp(0, size - 1))
            if found is not None:
                mine = index >= first
                more = Entries(
                    torch.where(mine[..., None], more.keys, found.keys),
                    torch.where(mine[..., None], more.values, found.values),
                    torch.where(mine, more.positions, found.positions),
                )
            found, first = more, first + size
        assert found is not None
        return found


class Store(Protocol):
    """How entries are represented once they are complete.

    ``block``: entries are packed in multiples of this many. ``recent``: the newest tokens of a
    sequence that stay as they are.
    """

    @property
    def block(self) -> int:
        """Entries that can only be packed together."""
        ...

    @property
    def recent(self) -> int:
        """Newest tokens that are not packed."""
        ...

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Stored:
        """Pack the entries of all layers: as many in each, a multiple of ``block``."""
        ...


@runtime_checkable
class Weighed(Store, Protocol):
    """A `Store` that looks at the attention that entries have received; packs with this instead."""

    def pack_weighed(
        self, facts: Facts, layers: Sequence[Entries], mass: Sequence[Tensor] | None
    ) -> Stored:
        """Pack as `Store.pack` does. ``mass`` float32 ``[kv_heads, n]`` for each layer.

        It is what the rows of the entries' own part of the prompt have given, or, after a
        selection, those of the whole prompt; rows that come later are not known, since what is
        packed is shared with them. None: nothing is known, as of decoded tokens.
        """
        ...


@dataclass
class Seen:
    """A sequence when its prompt has been computed, or while it is decoding.

    ``tokens``: so far, prompt included; ``prompt``: of the prompt. ``entries(layer)`` is all that
    the sequence holds. ``queries(layer)`` are its last ``Select.window`` rotated queries (fewer if
    it is shorter) ``[w, heads, head_dim]``. ``mass(layer)`` is, for a `Select` with
    ``mass``, the attention that each entry has received so far, summed over queries and the query
    heads of its group: float32 ``[kv_heads, n]``. Both are of the prompt, and while decoding there
    only for a `Select` that is ``online``. ``state`` is the method's own, kept with the sequence.
    """

    facts: Facts
    prompt: int
    tokens: int
    entries: Callable[[int], Entries]
    queries: Callable[[int], Tensor]
    mass: Callable[[int], Tensor]
    state: dict[str, Any] = field(default_factory=dict)


class Select(Protocol):
    """Which entries a sequence keeps.

    ``window``: how many of the last queries the method looks at. ``mass``: whether it needs the
    attention that entries have received. ``every``: after how many new tokens it selects again
    while decoding; None: never. ``online``: whether it then looks at the output's queries and mass
    too.
    """

    @property
    def window(self) -> int:
        """Last queries that `select` looks at."""
        ...

    @property
    def mass(self) -> bool:
        """Whether it needs the attention that entries have received."""
        ...

    @property
    def every(self) -> int | None:
        """New tokens after which it selects again."""
        ...

    @property
    def online(self) -> bool:
        """Whether queries and mass go on while decoding. Needs ``every``."""
        ...

    def select(self, seen: Seen) -> list[list[Tensor]] | list[Entries] | None:
        """For each layer, either what to keep, or what to hold instead; None: leave all.

        What to keep are ascending indices into the layer's entries, int64, for each KV head. What
        to hold instead are new (merged) entries; the tokens' accumulated mass is then forgotten.
        """
        ...


@dataclass
class Reader:
    """One row that fetches: the token id that it computes and that token's position.

    ``state`` is the method's own, kept with the sequence.
    """

    token: int
    position: int
    state: dict[str, Any]


class Index(Protocol):
    """What a `Fetch` keeps beside the complete entries of a node, for all who read it."""

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        ...


@dataclass(frozen=True)
class Asked:
    """Rows ``[row, row + rows)`` of a step read a node of ``entries``, which has ``index``."""

    row: int
    rows: int
    index: Any
    entries: int

    @property
    def part(self) -> slice:
        """The rows."""
        return slice(self.row, self.row + self.rows)


@dataclass(frozen=True)
class Chosen:
    """What rows read of a node: for each row and KV head some chunks, none of them twice.

    Chunk c is the node's entries ``[c * size, (c + 1) * size)``, as far as there are any; with
    ``size`` 1 it is entry c. ``chunks`` int64 ``[rows, kv_heads, k]``. ``mask``, bool of the same
    shape, is True for what is read, where some rows or heads read fewer than k; None: all are. Both
    are contiguous.
    """

    chunks: Tensor
    size: int = 1
    mask: Tensor | None = None

    def places(self, entries: int) -> tuple[Tensor, Tensor | None]:
        """Single entries, int64 ``[rows, kv_heads, k * size]``, and their mask.

        ``entries``: of the node.
        """
        if self.size == 1:
            return self.chunks, self.mask
        first = (self.chunks * self.size)[..., None]
        places = first + torch.arange(self.size, device=first.device)
        there = (places < entries) | (first >= entries)  # what is nowhere is not to be hidden
        if self.mask is not None:
            there = there & self.mask[..., None]
        elif bool(there.all()):
            return places.flatten(-2), None
        return places.where(there, first).flatten(-2), there.flatten(-2)


class Fetch(Protocol):
    """Which entries a query reads while decoding. Prefill reads everything.

    ``window``: how many of a node's last queries `index` looks at.
    """

    @property
    def window(self) -> int:
        """Last queries that `index` looks at."""
        ...

    def index(
        self,
        facts: Facts,
        layers: Callable[[int], Entries],
        tokens: NDArray[np.int32],
        queries: Callable[[int], Tensor],
    ) -> Index | None:
        """Look at a node's complete entries, layer by layer; None: too few to be worth it.

        ``tokens``: the ids from the prompt's first token to the node's last, so that they are
        counted as entries' positions are. ``queries(layer)``: the node's last ``window`` rotated
        queries ``[w, heads, head_dim]``; fewer if it is shorter, and none at all if a later prompt
        has cut the node in two or its KV comes from a file.
        """
        ...

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader], asked: Sequence[Asked]
    ) -> list[Chosen]:
        """What a step's rows read, of each that is ``asked``: of all nodes in one call a layer.

        ``q`` ``[rows, heads, head_dim]`` (rotated, unscaled) and ``readers`` are the whole step's.
        """
        ...


class Sparse(Protocol):
    """Which of the keys before them the rows of a prompt's chunk read.

    Rows choose in blocks of ``block``, counted from the chunk's first row; the last may be shorter.
    A row always reads its own block up to itself; a method chooses among what is before the block.
    Everything is read by layers with a sliding window, by chunks shorter than a block or that end
    within a prompt's first ``least`` tokens, and by a prompt's last ``tail`` tokens.
    """

    @property
    def block(self) -> int:
        """Rows that choose together."""
        ...

    @property
    def least(self) -> int:
        """First tokens of a prompt among which nothing is chosen."""
        ...

    @property
    def tail(self) -> int:
        """Last tokens of a prompt that read everything."""
        ...

    def choose(
        self, facts: Facts, layer: int, q: Tensor, entries: Entries, start: int
    ) -> list[list[Tensor]]:
        """What each block of the rows ``q`` ``[n, heads, head_dim]`` (rotated, unscaled) reads.

        ``entries``: of positions ``[0, start + n)``, in order; the rows are the last n. Returns for
        each block b and each KV head the places that it reads before the block: int64, each once,
        below ``start + b * block``.
        """
        ...


class Shorten(Protocol):
    """Choose a prompt's tokens before it is computed."""

    def layers(self, depth: int) -> int:
        """How many of the model's ``depth`` layers it runs on the whole prompt."""
        ...

    def shorten(self, q: Tensor, keys: Tensor) -> NDArray[np.int64] | None:
        """Ascending places of the tokens to keep; None: all.

        ``q`` ``[heads, head_dim]``: the last token's rotated query in the last layer that it runs;
        ``keys`` ``[kv_heads, tokens, head_dim]``: that layer's rotated keys.
        """
        ...


@dataclass(frozen=True)
class Recipe:
    """A composition: at most one method an axis, and what to do before and in prefill."""

    name: str = "none"
    select: Select | None = None
    store: Store | None = None
    fetch: Fetch | None = None
    sparse: Sparse | None = None
    shorten: Shorten | None = None

    @property
    def plain(self) -> bool:
        """Whether it changes nothing."""
        return self == replace(Recipe(), name=self.name)
