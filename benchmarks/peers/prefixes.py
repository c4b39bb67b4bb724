"""Which prompts to run together, and what they share: plain functions on sorted prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


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
