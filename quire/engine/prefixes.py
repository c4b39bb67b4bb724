"""Loads prompts' KV from files instead of computing it, and keeps there what was computed.

Pieces are cut where a node's segment begins and at multiples of `PIECE` tokens of the prompt; the
last piece of a node that several prompts share ends with the node. So a later run, whose tree may
be cut elsewhere, is in step again after at most `PIECE` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from quire.engine.world import Work, World
from quire.kv.arena import Arena, TiledArena
from quire.kv.tiers.prefixes import PrefixFiles, piece_name
from quire.kv.tree import Node, Tokens
from quire.schedule.state import Sequence as Seq

PIECE = 256  # tokens
LEAST = 16  # a shorter piece is computed sooner than read
NEXT = 8  # waiting sequences whose pieces are read ahead


class Prefixes:
    """One engine's traffic with its prefix files.

    ``tail``: last tokens of a node that are always computed, since a KV method looks at their
    queries.
    """

    def __init__(
        self, files: PrefixFiles, arena: Arena | TiledArena, world: World, tail: int
    ) -> None:
        self.files = files
        self.arena = arena
        self.world = world
        self.tail = tail
        self._coming: dict[int, list[tuple[Node, int, int, str]]] = {}  # by sequence

    def load(self, works: Sequence[Work], needs_all: Callable[[Seq], bool]) -> list[Work]:
        """Fill what is in files; returns what is left to be computed.

        ``needs_all``: of which sequences every prompt token must be computed.
        """
        self._read_ahead()
        left = []
        for work in works:
            node, item = work.node, work.item
            if node is None or needs_all(work.sequence):
                left.append(work)
                continue
            count = self._fill(work, node)
            self.world.counters.prompt_loaded += count
            self.world.counters.prompt_computed -= count
            work.sequence.computed_here -= count
            if count < item.count:
                item = replace(item, start=item.start + count, count=item.count - count)
                left.append(
                    replace(work, item=item, tokens=work.tokens[count:], slots=work.slots[count:])
                )
        return left

    def keep(self, works: Sequence[Work]) -> None:
        """Write the pieces that ``works`` have completed. To be called before KV is packed."""
        for work in works:
            node, stop = work.node, work.item.start + work.item.count
            if node is None or node.segment is None or node.segment.stored:
                continue
            for start, end in _cuts(node, work.item.start, stop):
                if end == node.end and end % PIECE and not node.children:
                    continue  # nobody else will ask for the end of a private prompt
                name = piece_name(work.sequence.prompt[:end], start)
                if end - start >= LEAST and not self.files.has(name):
                    self.files.write(name, self._numbers(node, start, end))

    def _fill(self, work: Work, node: Node) -> int:
        """Load the first tokens of ``work``; returns how many."""
        prompt, first = work.sequence.prompt, work.item.start
        # Where a prompt ends, the last hidden state is wanted.
        stop = min(first + work.item.count, node.end - max(self.tail, int(node.ends > 0)))
        at = first
        while at < stop:
            start, end, name = self._find(prompt, node, at)
            numbers = self.files.read(name, end - start) if name else None
            if numbers is None:
                break
            upto = min(end, stop)
            device = self.arena.keys.device
            slots = torch.from_numpy(work.slots[at - first : upto - first]).to(device)
            part = numbers[:, :, at - start : upto - start].to(device)
            for layer in range(part.shape[1]):
                self.arena.write(layer, slots, part[0, layer], part[1, layer])
            at = upto
        return at - first

    def _find(self, prompt: Tokens, node: Node, at: int) -> tuple[int, int, str]:
        """The piece that holds position ``at``: its ends, and its name or "" """
        start = max(node.kv_start, at // PIECE * PIECE)
        whole = (at // PIECE + 1) * PIECE
        for end in (whole, node.end):
            if start + LEAST <= end <= min(whole, len(prompt)):
                name = piece_name(prompt[:end], start)
                if self.files.has(name):
                    return start, end, name
        return start, start, ""

    def _numbers(self, node: Node, start: int, end: int) -> Tensor:
        """What the arena holds of ``[start, end)``; see `Layout`."""
        assert node.segment is not None
        inside = slice(start - node.kv_start, end - node.kv_start)
        slots = torch.from_numpy(node.segment.slots[inside]).to(self.arena.keys.device)
        layers = range(self.files.layout.layers)
        both = [torch.stack(self.arena.read(layer, slots)) for layer in layers]
        return torch.stack(both, dim=1).transpose(2, 3).cpu()  # tokens before heads

    def _read_ahead(self) -> None:
        """Let the pieces of the sequences that come next be read."""
        following = [seq for seq in self.world.state.running if seq.leaf.missing]
        following += islice(self.world.state.waiting, NEXT)
        self._coming = {
            seq.id: self._coming[seq.id] if seq.id in self._coming else list(self._pieces(seq))
            for seq in following
        }
        self.files.ahead(
            (name, end - start)
            for pieces in self._coming.values()
            for node, start, end, name in pieces
            if node.kv_start + node.computed < end
        )

    def _pieces(self, seq: Seq) -> Iterator[tuple[Node, int, int, str]]:
        for node in seq.leaf.path():
            at = node.kv_start + node.computed
            while at < node.end:
                start, end, name = self._find(seq.prompt, node, at)
                if name:
                    yield node, start, end, name
                at = max(end, start // PIECE * PIECE + PIECE)


def _cuts(node: Node, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """The pieces of ``node`` that end within ``(first, stop]``."""
    ends = np.arange((first // PIECE + 1) * PIECE, stop + 1, PIECE).tolist()
    if stop == node.end and stop % PIECE:
        ends.append(stop)
    for end in ends:
        yield max(node.kv_start, (end - 1) // PIECE * PIECE), end
