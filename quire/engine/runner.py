"""The model runner: turns the work of a step into one flat, unpadded token batch and runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quire.attention import chosen, composed, merged, native, reference
from quire.attention.segments import Item, last_rows, lay_out
from quire.engine.fused import Fused, fuse
from quire.engine.keeper import Chunk, Keeper
from quire.engine.world import Work
from quire.kernels.kv import rotate_append
from quire.kv.arena import Arena, TiledArena
from quire.kv.method import Index, Reader
from quire.kv.pages import Segment
from quire.models import rope
from quire.models.decoder import Decoder

LOGIT_BYTES = 64 << 20  # workspace for one tile of float32 logits

Rotation = tuple[Tensor, Tensor] | None
Read = Callable[[int, Tensor], Tensor]
"""Attention of a layer, of rotated queries ``[rows, heads, head_dim]``, whose KV is stored."""


@dataclass
class Runner:
    """Runs a model over the KV arena, whose layout says which attention runs.

    ``plain`` uses the reference attention throughout. ``deterministic``: a token's result does not
    depend on what else is in the batch (a `TiledArena` only).
    """

    model: Decoder
    arena: Arena | TiledArena
    plain: bool = False
    deterministic: bool = False
    keeper: Keeper | None = None
    head_seconds: float = 0.0  # spent on logits
    fused: Fused | None = None  # the layers in one call, where that is all that is wanted

    def __post_init__(self) -> None:
        if isinstance(self.arena, TiledArena) and not self.plain and self.keeper is None:
            self.fused = fuse(self.model, self.arena)

    def forward(self, works: Sequence[Work], wanted: Sequence[int] | None = None) -> Tensor:
        """Compute all tokens of ``works`` (in order): final hidden states [rows, hidden].

        Rows are the last ``wanted[i]`` tokens of each, or all of them.
        """
        device = self.arena.keys.device
        ids = torch.from_numpy(np.concatenate([w.tokens for w in works]).astype(np.int64))
        slots = torch.from_numpy(np.concatenate([w.slots for w in works])).to(device)
        items = ends = [work.item for work in works]
        positions = np.concatenate([np.arange(i.start, i.start + i.count) for i in items])
        at = torch.from_numpy(positions).to(device)
        rows: Tensor | None = None
        if wanted is not None and sum(wanted) < len(ids):
            ends, chosen_rows = last_rows(items, wanted)
            rows = torch.from_numpy(chosen_rows).to(device)
        with torch.inference_mode():
            if self.fused is not None:
                plans = self._plans(items, self.fused.windows)
                window = self.model.spec.layers[-1].window
                ending = None if rows is None else self._plans(ends, [window])[window]
                return self.model.around(ids, at, self.fused.over(slots, plans, rows, ending))
            if self.keeper is None:
                read = self._exact(items, ends, rows)
            else:
                read = self._composed(works, at, rows)

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
                return read(layer, self._append(layer, slots, q, k, v, rotation))

            return self.model.forward(ids.to(device), at, attend, rows=rows)

    def _append(
        self, layer: int, slots: Tensor, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation
    ) -> Tensor:
        """Append rotated keys and values to the arena; returns the rotated queries."""
        arena = self.arena
        if isinstance(arena, TiledArena) and not self.plain:
            rotate_append(q, k, v, rotation, slots, arena.keys[layer], arena.values[layer])
            return q
        if rotation is not None:
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        arena.write(layer, slots, k, v)
        return q.contiguous()

    def _exact(self, items: list[Item], ends: list[Item], rows: Tensor | None) -> Read:
        """The attention of a step; the last layer's is of ``rows`` only, which are ``ends``."""
        windows = [layer.window for layer in self.model.spec.layers]
        every = self._over(items, set(windows))
        if rows is None:
            return every
        ending = self._over(ends, {windows[-1]})

        def read(layer: int, q: Tensor) -> Tensor:
            return every(layer, q) if layer < len(windows) - 1 else ending(layer, q[rows])

        return read

    def _over(self, items: list[Item], windows: set[int | None]) -> Read:
        """Attention of ``items``, laid out for each of the windows of layers."""
        arena, spec = self.arena, self.model.spec
        scale, softcap = spec.scale, spec.softcap
        if isinstance(arena, TiledArena) and not self.plain:
            plans = self._plans(items, windows)

            def read_tiles(layer: int, q: Tensor) -> Tensor:
                plan = plans[spec.layers[layer].window]
                return native.attend(arena, layer, q, plan, scale=scale, softcap=softcap)

            return read_tiles

        if isinstance(arena, Arena) and not self.plain:
            like = arena.keys
            tables = {
                window: merged.Tables.make(lay_out(items, window), like.device, like.dtype)
                for window in windows
            }

            def read_merged(layer: int, q: Tensor) -> Tensor:
                table = tables[spec.layers[layer].window]
                return merged.attend(arena, layer, q, table, scale=scale, softcap=softcap)

            return read_merged

        def read_plainly(layer: int, q: Tensor) -> Tensor:
            window = spec.layers[layer].window
            return reference.attend(
                arena, layer, q, items, scale=scale, softcap=softcap, window=window
            )

        return read_plainly

    def _plans(
        self, items: Sequence[Item], windows: Iterable[int | None]
    ) -> dict[int | None, native.Plan]:
        """The native kernels' plan for each window."""
        return {
            window: native.Plan.make(items, self._shape(), window, in_order=self.deterministic)
            for window in windows
        }

    def _shape(self) -> native.Shape:
        spec = self.model.spec
        return native.Shape(len(spec.layers), spec.heads, spec.kv_heads, spec.head_dim)

    def _composed(self, works: Sequence[Work], positions: Tensor, wanted: Tensor | None) -> Read:
        """The attention of a step under a KV recipe: what methods hold, and what they choose.

        Methods watch all queries in every layer; the last layer's result is of ``wanted`` only.
        """
        keeper = self.keeper
        assert keeper is not None
        windows = [layer.window for layer in self.model.spec.layers]
        items = [w.item for w in works]
        index_of = keeper.indexes(works).get
        readers = [
            keeper.reader(work.sequence, int(token), work.item.start + place)
            for work in works
            for place, token in enumerate(work.tokens)
        ]
        chunks = keeper.chunks(works)
        choosing: set[int | None] = {None} if chunks else set()  # layers with these windows
        everything = self._read(items, index_of, positions, readers, set(windows) - choosing)
        left, others = _without(items, chunks)
        some = [readers[row] for row in others.tolist()]
        at = positions[others.to(positions.device)]
        beside = self._read(left, index_of, at, some, choosing) if left else None

        def read(layer: int, q: Tensor) -> Tensor:
            if windows[layer] in choosing:
                out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
                if beside is not None:
                    out[others] = beside(layer, q[others]).to(q.dtype)
                for chunk in chunks:
                    rows = slice(chunk.row, chunk.row + chunk.rows)
                    entries, choice = keeper.choose(chunk, layer, q)
                    out[rows] = chosen.attend(
                        q[rows],
                        entries,
                        choice,
                        chunk.block,
                        scale=self.model.spec.scale,
                        softcap=self.model.spec.softcap,
                        plain=self.plain,
                    )
            else:
                out = everything(layer, q).to(q.dtype)
            keeper.watch(works, layer, q, positions)
            return out if wanted is None or layer < len(windows) - 1 else out[wanted]

        return read

    def _read(
        self,
        items: Sequence[Item],
        index_of: Callable[[Segment], Index | None],
        positions: Tensor,
        readers: Sequence[Reader],
        windows: set[int | None],
    ) -> Read:
        """Attention of ``items`` in layers with those windows: arena's, and what methods hold."""
        arena, spec = self.arena, self.model.spec
        scale, softcap = spec.scale, spec.softcap
        assert self.keeper is not None
        plain, reads = composed.reads_of(items, index_of, self.keeper.recipe.fetch)
        tiled = isinstance(arena, TiledArena) and not self.plain
        plans = self._plans(plain, windows) if tiled else {}
        if tiled:
            reads = reads.planned(self._shape(), windows, positions.numpy())

        def read(layer: int, q: Tensor) -> Tensor:
            window = spec.layers[layer].window
            if isinstance(arena, TiledArena) and tiled:
                lse = torch.empty(q.shape[:2]) if reads else None
                out = native.attend(
                    arena, layer, q, plans[window], scale=scale, softcap=softcap, lse=lse
                )
            else:
                part = composed.arena_part(
                    arena, layer, q, plain, scale=scale, softcap=softcap, window=window
                )
                out, lse = part.out, part.lse
            if not reads:
                return out
            assert lse is not None
            total = composed.Partial(out.float(), lse)
            composed.add_reads(
                total,
                reads,
                arena,
                layer,
                q,
                positions,
                readers,
                scale=scale,
                softcap=softcap,
                window=window,
            )
            return total.out

        return read

    def each_logits(self, hidden: Tensor, use: Callable[[Tensor, int], None]) -> None:
        """Call ``use(logits, first_row)`` on tiles of the logits of ``hidden`` [rows, hidden]."""
        tile = max(1, LOGIT_BYTES // (4 * self.model.spec.vocab_size))
        with torch.inference_mode():
            for first in range(0, len(hidden), tile):
                started = time.perf_counter()
                logits = self.model.logits(hidden[first : first + tile])
                self.head_seconds += time.perf_counter() - started
                use(logits, first)


def _without(items: Sequence[Item], chunks: Sequence[Chunk]) -> tuple[list[Item], Tensor]:
    """What is left of ``items``, and which rows those are, when ``chunks`` have been taken out.

    Without chunks that is nothing.
    """
    taken = {chunk.row: chunk.rows for chunk in chunks}
    left: list[Item] = []
    others: list[int] = []
    row = 0
    for item in items if chunks else ():
        rows = taken.get(row, 0)
        if rows < item.count:
            left.append(replace(item, start=item.start + rows, count=item.count - rows))
        others += range(row + rows, row + item.count)
        row += item.count
    return left, torch.tensor(others, dtype=torch.int64)
