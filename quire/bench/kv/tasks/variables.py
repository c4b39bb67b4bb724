"""Multi-hop retrieval: variables that are set to one another (SCBench's and RULER's vt).

The answer is the word at a chain's end, two steps away; chosen among the ends of four chains: one
in four by chance.
"""

from __future__ import annotations

from random import Random

from quire.bench.kv.session import Session, Turn
from quire.bench.kv.tasks.words import common_words, sentences

CHAINS = 4


def variables(rng: Random, size: int, turns: int) -> Session:
    """Chains of two assignments, in any order, among ``size`` sentences of prose."""
    words = rng.sample(common_words(), CHAINS)
    names = rng.sample([f"X{n}" for n in range(10, 100)], 2 * CHAINS)
    firsts, seconds = names[:CHAINS], names[CHAINS:]
    prose = sentences()
    start = rng.randrange(len(prose))
    lines = [prose[(start + i) % len(prose)] for i in range(size)]
    for first, second, word in zip(firsts, seconds, words, strict=True):
        for line in (f"{first} = {word}.", f"{second} = {first}."):
            lines.insert(rng.randrange(len(lines) + 1), line)
    asked = []
    for turn in range(turns):
        right = words[turn % CHAINS]
        choices = tuple(f" {w}.\n" for w in (right, *(w for w in words if w != right)))
        asked.append(Turn(f"The value of {seconds[turn % CHAINS]} is", choices[0], "", choices))
    return Session(" ".join(lines) + "\n\n", tuple(asked))
