"""Which prompts to run together, and what they share: plain functions on sorted prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Sample:
    """One sample of a request."""

    prompt: Tokens
    max_tokens: int
    greedy: bool


@dataclass(frozen=True)
class Segment:
    """Tokens shared by the sequences ``first`` to ``last``, at position ``start`` of each.

    ``ending``: how many of them, the foremost, have their last prompt token here.
    """

    tokens: Tokens
    start: int
    first: int
    last: int
    ending: int


def common(left: Tokens, right: Tokens) -> int:
    """Tokens that two prompts have in common at the start."""
    size = min(len(left), len(right))
    differs = (left[:size] != right[:size]).nonzero()[0]
    return int(differs[0]) if len(differs) else size


def segments(prompts: Sequence[Tokens]) -> list[list[Segment]]:
    """The prefix tree of sorted prompts, level by level; a level needs those before it."""
    levels: list[list[Segment]] = []
    todo = [(0, len(prompts), 0, 0)]
    while todo:
        first, last, depth, level = todo.pop()
        end = common(prompts[first], prompts[last - 1])
        ending = first
        while ending < last and len(prompts[ending]) == end:
            ending += 1
        if end > depth:
            levels += [[] for _ in range(level + 1 - len(levels))]
            tokens = prompts[first][depth:end]
            levels[level].append(Segment(tokens, depth, first, last, ending - first))
            level += 1
        at = ending
        while at < last:
            until = at + 1
            while until < last and prompts[until][end] == prompts[at][end]:
                until += 1
            todo.append((at, until, end, level))
            at = until
    return levels


def waves(
    sequences: Sequence[Sample], most: int, cells: int, fewest: int = 8
) -> list[list[Sample]]:
    """Cut sorted sequences into waves that run together.

    A wave has at most ``most`` sequences and ``cells`` tokens of KV, with what the next wave keeps
    of it. From ``fewest`` on it ends where the next sequence shares less than half of its prompt.
    """
    found: list[list[Sample]] = []
    used = 0
    for sequence in sequences:
        size, shares = len(sequence.prompt), 0
        if found:
            shares = common(found[-1][-1].prompt, sequence.prompt)
        own = size - shares + sequence.max_tokens
        full = found and (len(found[-1]) == most or used + own > cells)
        if not found or full or (len(found[-1]) >= fewest and shares < size // 2):
            found.append([])
            used, own = shares, size - shares + sequence.max_tokens
        found[-1].append(sequence)
        used += own
    return found


def cells_needed(wave: Sequence[Sample]) -> int:
    """Tokens of KV of a wave: what is distinct in its prompts, and all output."""
    total = len(wave[0].prompt) + sum(s.max_tokens for s in wave)
    for left, right in itertools.pairwise(wave):
        total += len(right.prompt) - common(left.prompt, right.prompt)
    return total


class Admission:
    """Which of some sorted prompts to start, so that what they share is found in a prefix cache.

    For engines that look a prompt up once, when it arrives: a prompt waits until another has
    computed the part that both share (of at least ``shortest`` tokens). What runs holds at most
    ``cells`` tokens of KV, ``outputs`` of them for the output of each prompt.
    """

    def __init__(
        self, prompts: Sequence[Tokens], outputs: Sequence[int], cells: int, shortest: int
    ) -> None:
        self.waiting = list(range(len(prompts)))
        self.computed: set[int] = set()
        self.running: set[int] = set()
        self._outputs, self._cells, self._used = outputs, cells, 0
        self._after: dict[int, int] = {}
        self._paths: list[list[Segment]] = [[] for _ in prompts]
        self._readers: dict[tuple[int, int], int] = {}
        for level in segments(prompts):
            for segment in level:
                for member in range(segment.first, segment.last):
                    self._paths[member].append(segment)
                    if member != segment.first and len(segment.tokens) >= shortest:
                        self._after[member] = segment.first

    def next(self) -> list[int]:
        """Prompts to start now, in their order; a later one does not overtake for its size."""
        found = []
        for member in list(self.waiting):
            if member in self._after and self._after[member] not in self.computed:
                continue
            added = self._outputs[member] + sum(
                len(s.tokens) for s in self._paths[member] if not self._count(s)
            )
            if self.running and self._used + added > self._cells:
                break
            self._used += added
            for segment in self._paths[member]:
                self._readers[segment.first, segment.start] = self._count(segment) + 1
            self.waiting.remove(member)
            self.running.add(member)
            found.append(member)
        return found

    def finish(self, member: int) -> None:
        """A prompt has all its output."""
        self.computed.add(member)
        self.running.remove(member)
        self._used -= self._outputs[member]
        for segment in self._paths[member]:
            left = self._count(segment) - 1
            self._readers[segment.first, segment.start] = left
            self._used -= 0 if left else len(segment.tokens)

    def _count(self, segment: Segment) -> int:
        return self._readers.get((segment.first, segment.start), 0)
