"""Carries out a KV recipe: sees to it that selectors, stores and fetchers are asked in time.

After each forward pass and before sampling: sequences whose prompt is complete get their own view
of it (`Select`); complete nodes are packed (`Store`), once for all their readers; so are the
tails of decoding sequences, block by block; and what a decoding sequence holds is selected again
when the method wants it. The only part of the engine that calls methods; it knows none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import Tensor

from quire.attention.composed import held, visible_at, weigh
from quire.attention.segments import Item
from quire.engine.world import Work, World
from quire.kv.arena import Arena, TiledArena
from quire.kv.method import Entries, Facts, Index, Plain, Reader, Recipe, Seen, Weighed, join
from quire.kv.pages import Segment
from quire.kv.tree import Node, Tokens
from quire.schedule.state import Sequence as Seq

MASS_ROWS = 64  # rows whose attention weights exist at once


@dataclass
class Notes:
    """What is remembered of a segment's rows. Lists have one tensor a layer.

    ``rows``: how many were watched, fewer than the segment has after a later prompt has cut it in
    two. ``queries``: the last rotated ones ``[w, heads, head_dim]``; ``mass``: attention that they
    gave to every entry before them, ``[kv_heads, entries]``. Of a sequence's view, both are of its
    tail as well.
    """

    rows: int = 0
    queries: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    index: Index | None = None
    indexed: int = -1  # entries when the index was made
    state: dict[str, Any] = field(default_factory=dict)
    selected: int = 0  # tokens of the sequence when it last selected
    refused: int = 0  # entries that would have saved nothing when packed


@dataclass(frozen=True)
class Chunk:
    """Rows ``[row, row + rows)`` of a step, the first of ``item``: they choose, block by block."""

    row: int
    rows: int
    item: Item
    block: int


class Keeper:
    """One engine's recipe at work. ``page_bytes``: of the pool.

    ``mass``: whether a method looks at the attention that entries receive. ``window``: how many of
    the last queries methods look at.
    """

    def __init__(
        self,
        recipe: Recipe,
        facts: Facts,
        arena: Arena | TiledArena,
        world: World,
        page_bytes: int,
    ) -> None:
        self.recipe = recipe
        self.facts = facts
        self.arena = arena
        self.world = world
        self.page_bytes = page_bytes
        select = recipe.select
        self._weighed = recipe.store if isinstance(recipe.store, Weighed) else None
        self.mass = self._weighed is not None or (select is not None and select.mass)
        looking = [method.window for method in (select, recipe.fetch) if method is not None]
        self.window = max(looking, default=0)
        self._notes: WeakKeyDictionary[Segment, Notes] = WeakKeyDictionary()
        self._settled: WeakSet[Seq] = WeakSet()  # need no view, since all of the prompt is kept

    def notes(self, segment: Segment) -> Notes:
        """What is remembered of ``segment``."""
        return self._notes.setdefault(segment, Notes())

    # While a step runs: what prompts choose to read, and what methods need to see.

    def chunks(self, works: Sequence[Work]) -> list[Chunk]:
        """The rows that a sparse prefill chooses for; all others read everything."""
        sparse = self.recipe.sparse
        found: list[Chunk] = []
        row = 0
        for work in works:
            item, node = work.item, work.node
            if sparse is not None and node is not None:
                end = node.end if node.ends else len(work.sequence.prompt)
                rows = min(item.count, end - sparse.tail - item.start)
                if rows >= sparse.block and item.start + rows > sparse.least:
                    found.append(Chunk(row, rows, item, sparse.block))
            row += item.count
        return found

    def choose(self, chunk: Chunk, layer: int, q: Tensor) -> tuple[Entries, list[list[Tensor]]]:
        """What is before and in ``chunk``, and what its rows read of it; see `Sparse.choose`.

        ``q`` ``[tokens, heads, head_dim]``: the rotated queries of the whole step.
        """
        sparse, start = self.recipe.sparse, chunk.item.start
        assert sparse is not None
        entries = self.path_entries(chunk.item, layer).part(0, start + chunk.rows)
        rows = q[chunk.row : chunk.row + chunk.rows]
        return entries, sparse.choose(self.facts, layer, rows, entries, start)

    def watch(self, works: Sequence[Work], layer: int, q: Tensor, positions: Tensor) -> None:
        """Keep what methods want to see.

        ``q`` ``[tokens, heads, head_dim]``: rotated. Mass is of attention to everything, also where
        rows have chosen what they read.
        """
        select = self.recipe.select
        online = select is not None and select.online
        row = 0
        for work in works:
            rows = slice(row, row + work.item.count)
            row += work.item.count
            decoding = work.node is None
            if not (select or self.mass or self.window) or (decoding and not online):
                continue
            segment = work.sequence.leaf.segment if decoding else work.item.segment
            assert segment is not None
            notes = self.notes(segment)
            notes.rows += work.item.count if layer == 0 else 0
            if self.window:
                known = notes.queries[layer] if layer < len(notes.queries) else q[:0]
                _put(notes.queries, layer, torch.cat([known, q[rows]])[-self.window :].clone())
            if self.mass:
                self._add_mass(notes, work.item, layer, q[rows], positions[rows])

    def _add_mass(self, notes: Notes, item: Item, layer: int, q: Tensor, positions: Tensor) -> None:
        """Add the attention that an item's rows give to each entry of its path."""
        entries = self.path_entries(item, layer)
        total = torch.zeros(entries.positions.shape)
        if layer < len(notes.mass):
            total[:, : notes.mass[layer].shape[1]] = notes.mass[layer]
        for first in range(0, len(q), MASS_ROWS):
            part = slice(first, first + MASS_ROWS)
            seen = entries.positions <= positions[part, None, None]
            window = visible_at(positions[part], entries, self.facts.windows[layer])
            if window is not None:
                seen = seen & window
            facts = self.facts
            scores = weigh(q[part], entries, scale=facts.scale, softcap=facts.softcap, visible=seen)
            total += scores.softmax(-1).sum((0, 2))
        _put(notes.mass, layer, total)

    def path_entries(self, item: Item, layer: int) -> Entries:
        """Everything that an item's last row may read, in order."""
        own = item.start + item.count - item.segment.length
        parts: list[Entries] = []
        for segment, start in (*item.before, (item.segment, own)):
            parts += held(self.arena, segment, start, layer)
        return join(parts)

    # What decoding rows fetch.

    def indexes(self, works: Sequence[Work]) -> dict[Segment, Index]:
        """The indexes of what decoding sequences read."""
        found: dict[Segment, Index] = {}
        if self.recipe.fetch is None:
            return found
        for work in works:
            if work.node is None:
                for node in work.sequence.leaf.path():
                    tokens = work.sequence.prompt[: node.end]
                    segment = node.segment
                    if segment is not None and segment not in found:
                        index = self._index(segment, node.kv_start, tokens)
                        if index is not None:
                            found[segment] = index
        return found

    def _index(self, segment: Segment, start: int, tokens: Tokens) -> Index | None:
        """The index of a complete segment, made when it is first asked for."""
        fetch = self.recipe.fetch
        assert fetch is not None
        notes = self.notes(segment)
        size = segment.packed or segment.entries
        if notes.indexed != size:

            def layers(layer: int) -> Entries:
                parts = held(self.arena, segment, start, layer)  # the arena's last
                return join(parts[:-1] or parts)

            def queries(layer: int) -> Tensor:
                return self._queries([notes], layer, fetch.window)

            notes.index = fetch.index(self.facts, layers, tokens, queries)
            notes.indexed = size
            if self.recipe.select is None or notes.selected:
                notes.queries = []  # nobody else looks at them
        return notes.index

    def reader(self, seq: Seq, token: int, position: int) -> Reader:
        """What a fetcher may know of a row, and the state that its sequence keeps for it."""
        return Reader(token, position, self.notes(seq.tail).state)

    # After the forward pass, before sampling.

    def after(self, works: Sequence[Work]) -> None:
        """Select, pack and select again, as the recipe asks for."""
        with torch.inference_mode():
            if self.recipe.select is not None:
                for seq in list(self.world.state.running):
                    viewed = seq.leaf.id in self.world.views or seq in self._settled
                    if not viewed and not seq.leaf.missing:
                        self._view(seq)
                if self.recipe.select.every is not None:
                    for work in works:
                        if work.node is None and work.sequence in self.world.state.running:
                            self._again(work.sequence)
            if self.recipe.store is not None:
                done = [work.node for work in works if work.node is not None]
                done += [s.leaf for s in self.world.state.running if s.leaf.id in self.world.views]
                for node in dict.fromkeys(done):
                    if node.segment is not None and not node.missing and not node.segment.stored:
                        self._pack(node.segment, node.kv_start, self._recent(node))
                for work in works:
                    if work.node is None:
                        seq = work.sequence
                        self._pack(seq.tail, seq.leaf.end, self.recipe.store.recent)

    def _recent(self, node: Node) -> int:
        """Newest entries of a complete node that stay: a shared one's are not the newest."""
        assert self.recipe.store is not None
        return self.recipe.store.recent if not node.children else 0

    def _pack(self, segment: Segment, start: int, recent: int) -> None:
        store = self.recipe.store
        assert store is not None
        notes = self.notes(segment)
        count = (segment.entries - recent) // store.block * store.block
        if count <= 0 or count == notes.refused:
            return
        layers = [
            held(self.arena, segment, start, layer)[-1].part(0, count)
            for layer in range(self.facts.layers)
        ]
        if self._weighed is not None:
            packed = self._weighed.pack_weighed(self.facts, layers, self._received(segment, count))
        else:
            packed = store.pack(self.facts, layers)
        freed = self.world.pool.store(segment, count, packed, -(-packed.nbytes // self.page_bytes))
        notes.refused = count if freed is None else 0
        if freed is not None:
            self.arena.forget(freed)

    def _received(self, segment: Segment, count: int) -> list[Tensor] | None:
        """The attention that the arena's first ``count`` entries of ``segment`` have received.

        A store asks for it once, when the segment is complete.
        """
        notes = self.notes(segment)
        mass = [m[:, m.shape[1] - segment.entries :][:, :count] for m in notes.mass]
        if self.recipe.select is None:
            notes.mass = []
        return mass or None

    def _seen(self, seq: Seq) -> Seen:
        path = seq.leaf.path()
        item = Item((), seq.leaf.end + seq.tail.length, 0, seq.tail, _segments(path))
        chain = [self.notes(node.segment) for node in path if node.segment is not None]

        def queries(layer: int) -> Tensor:
            select = self.recipe.select
            assert select is not None
            return self._queries(chain, layer, select.window)

        def mass(layer: int) -> Tensor:
            size = len(self.path_entries(item, layer))
            total = torch.zeros(self.facts.kv_heads, size)
            for notes in chain:
                if layer < len(notes.mass):
                    total[:, : notes.mass[layer].shape[1]] += notes.mass[layer]
            return total

        return Seen(
            self.facts,
            len(seq.prompt),
            len(seq.prompt) + seq.tail.length,
            lambda layer: self.path_entries(item, layer),
            queries,
            mass,
            chain[-1].state if seq.leaf.id in self.world.views else {},
        )

    def _queries(self, chain: Sequence[Notes], layer: int, window: int) -> Tensor:
        """The last ``window`` queries that were watched on a path, or fewer."""
        none = self.arena.keys.new_empty(0, self.facts.heads, self.facts.head_dim)
        known = [notes.queries[layer] for notes in chain if layer < len(notes.queries)]
        found = torch.cat([none, *known])
        return found[max(0, len(found) - window) :]

    def _watched(self, seq: Seq) -> bool:
        """Whether the selector can be shown what it wants to see of the prompt.

        Rows above the place where a later prompt has cut a node have left their notes below it.
        """
        select = self.recipe.select
        assert select is not None
        needed = len(seq.prompt) if select.mass else min(select.window, len(seq.prompt))
        rows = tokens = 0
        for segment, _ in reversed(_segments(seq.leaf.path())):
            rows += self.notes(segment).rows
            if rows >= needed:
                break
            tokens += segment.length
            if rows < tokens:
                return False
        return True

    def _view(self, seq: Seq) -> None:
        """Give ``seq`` its own copy of what the selector keeps of its prompt."""
        select = self.recipe.select
        assert select is not None
        if not self._watched(seq):
            self.world.restart(seq)
            return
        seen = self._seen(seq)
        found = select.select(seen)
        if found is None and select.every is None:
            self._settled.add(seq)
            return
        needed = self._weighed is not None or (select.mass and select.online)
        held_now, mass = _apply(seen, found, needed)
        longest = max(len(entries) for entries in held_now)
        mass = [torch.nn.functional.pad(m, (0, longest - m.shape[1])) for m in mass]
        notes = Notes(mass=mass, state=seen.state, selected=seen.tokens)
        fetch = self.recipe.fetch
        if (select.window and select.online) or (fetch is not None and fetch.window):
            above = [self.notes(segment) for segment, _ in _segments(seq.leaf.path())]
            layers = range(self.facts.layers)
            notes.queries = [self._queries(above, layer, self.window) for layer in layers]
        segment = self.world.view(seq, longest)
        if segment is None:
            return  # no room: the sequence starts again, alone
        self._fill(segment, held_now)
        self._notes[segment] = notes

    def _again(self, seq: Seq) -> None:
        select = self.recipe.select
        segment = seq.leaf.segment
        assert select is not None
        assert select.every is not None
        assert segment is not None
        notes = self.notes(segment)
        tokens = len(seq.prompt) + seq.tail.length
        if tokens - notes.selected < select.every:
            return
        seen = self._seen(seq)
        found = select.select(seen)
        notes.selected = tokens
        if found is None:
            return
        held_now, mass = _apply(seen, found, select.mass and select.online)
        self.world.refill(seq, max(len(entries) for entries in held_now))
        self._fill(segment, held_now)
        notes.mass = mass

    def _fill(self, segment: Segment, layers: list[Entries]) -> None:
        """Write entries, as many as each layer and head has, into an empty segment's slots."""
        biased = any(entries.bias is not None for entries in layers)
        if biased:  # to be stored, with whole pages
            segment.entries = len(segment.slots)
        kept = np.zeros((self.facts.layers, self.facts.kv_heads), dtype=np.int64)
        places = np.zeros((*kept.shape, segment.entries), dtype=np.int32)
        for layer, entries in enumerate(layers):
            slots = torch.from_numpy(segment.slots[: len(entries)])
            dtype = self.facts.dtype
            k, v = (x.to(dtype).transpose(0, 1) for x in (entries.keys, entries.values))
            self.arena.write(layer, slots.to(k.device), k.contiguous(), v.contiguous())
            count = entries.count
            kept[layer] = len(entries) if count is None else count.numpy()
            places[layer, :, : len(entries)] = entries.positions.numpy()
        segment.places = places
        if (kept != segment.entries).any():
            segment.kept = kept
        if biased:
            self._fill_biased(segment, layers)

    def _fill_biased(self, segment: Segment, layers: list[Entries]) -> None:
        """Hold entries that have a bias, for which the arena has no place, as they are."""
        plain = Plain(tuple(entries.widened(segment.entries) for entries in layers))
        pool = self.world.pool
        freed = pool.store(segment, segment.entries, plain, len(pool.pages_of(segment)))
        assert freed is not None
        self.arena.forget(freed)


def _apply(
    seen: Seen, found: list[list[Tensor]] | list[Entries] | None, mass: bool
) -> tuple[list[Entries], list[Tensor]]:
    """What the sequence holds after a selection, and the mass that its entries have received."""
    layers = range(seen.facts.layers)
    if found is None:
        return [seen.entries(i) for i in layers], [seen.mass(i) for i in layers] if mass else []
    held_now: list[Entries] = []
    masses: list[Tensor] = []
    for layer in layers:
        choice: Entries | list[Tensor] = found[layer]
        if isinstance(choice, Entries):
            held_now.append(choice)
            continue
        held_now.append(seen.entries(layer).take(choice))
        if mass:
            before = seen.mass(layer)
            kept = torch.zeros(len(choice), len(held_now[-1]))
            for head, index in enumerate(choice):
                kept[head, : len(index)] = before[head, index]
            masses.append(kept)
    return held_now, masses


def _segments(path: Sequence[Node]) -> tuple[tuple[Segment, int], ...]:
    return tuple((n.segment, n.kv_start) for n in path if n.segment is not None)


def _put(tensors: list[Tensor], layer: int, value: Tensor) -> None:
    if layer < len(tensors):
        tensors[layer] = value
    else:
        tensors.append(value)
