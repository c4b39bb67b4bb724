"""What a task is made of: a shared context, and several turns of question and answer on it.

After SCBench (arXiv 2412.10319), whose sessions are run in two modes: every question as a request
of its own (multi-request), or all in one conversation with the right answers in its history
(multi-turn).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from random import Random

import numpy as np

from quire.kv.tree import Tokens


@dataclass(frozen=True)
class Turn:
    """One question, as text that follows what was before; ``answer`` continues ``question``.

    ``choices``: the closed set that the answer is one of, as answers, the right one included;
    empty where the answer is to be written freely. ``end`` stands between answer and next question.
    """

    question: str
    answer: str
    end: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Session:
    """A shared context and its turns."""

    context: str
    turns: tuple[Turn, ...]

    @property
    def text(self) -> str:
        """The whole conversation."""
        return self.context + "".join(t.question + t.answer + t.end for t in self.turns)


Make = Callable[[Random, int, int], Session]  # random numbers, items in the context, turns
Encode = Callable[[str], list[int]]


def fit(make: Callable[[int], Session], encode: Encode, length: int) -> Session:
    """The session of most items whose whole text has at most ``length`` tokens.

    ``make`` is given a number of items, of which one is the least.
    """
    low, high = 1, 2
    while len(encode(make(high).text)) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if len(encode(make(middle).text)) <= length:
            low = middle
        else:
            high = middle
    return make(low)


def cut_tokens(encode: Encode, parts: Sequence[str]) -> list[Tokens]:
    """The tokens of consecutive ``parts`` of a text, int32, as they are in the whole of it.

    A token that spans a boundary belongs to the later part.
    """
    whole = encode("".join(parts))
    cuts = [0]
    for index in range(1, len(parts)):
        head = encode("".join(parts[:index]))
        same = next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), None)
        cuts.append(max(cuts[-1], min(len(head), len(whole)) if same is None else same))
    cuts.append(len(whole))
    tokens = np.array(whole, dtype=np.int32)
    return [tokens[a:b] for a, b in pairwise(cuts)]


def held_out() -> str:
    """Prose that the demonstration model was not trained on: from War and Peace, translated by
    Louise and Aylmer Maude (public domain).
    """
    return (files("quire") / "bench" / "kv" / "held_out.txt").read_text(encoding="utf-8")
