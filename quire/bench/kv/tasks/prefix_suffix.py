"""String retrieval: the string with a given beginning and end (SCBench's prefix-suffix).

Four strings begin alike, so the beginning alone does not tell. The answer is the middle; chosen
among those of the four: one in four by chance.
"""

from __future__ import annotations

from random import Random

from quire.bench.kv.session import Session, Turn
from quire.bench.kv.tasks.words import common_words

ALIKE = 4


def prefix_suffix(rng: Random, size: int, turns: int) -> Session:
    """``size`` groups of strings of three words, and turns that ask for one by its ends."""
    words = common_words()
    groups = []
    for prefix in rng.sample(words, max(size, turns)):
        ends = rng.sample(words, 2 * ALIKE)
        groups.append([(prefix, ends[i], ends[ALIKE + i]) for i in range(ALIKE)])
    lines = [" ".join(line) for group in groups for line in group]
    rng.shuffle(lines)
    asked = []
    for group in rng.sample(groups, turns):
        right = rng.randrange(ALIKE)
        prefix, middle, suffix = group[right]
        others = [m for _, m, _ in group if m != middle]
        choices = tuple(f" {m} {suffix}\n" for m in (middle, *others))
        asked.append(Turn(f"Which ends with {suffix}?\n- {prefix}", choices[0], "", choices))
    return Session("".join(f"- {line}\n" for line in lines), tuple(asked))
