"""Global counting: which value of a kind comes most often (SCBench's mf).

The answer is chosen among the four values of the kind: one in four by chance.
"""

from __future__ import annotations

from random import Random

from quire.bench.kv.session import Session, Turn

KINDS = {
    "colour": ("red", "green", "black", "white"),
    "animal": ("horse", "fish", "bird", "dog"),
    "person": ("king", "doctor", "soldier", "servant"),
    "place": ("house", "river", "forest", "street"),
    "thing": ("table", "letter", "sword", "book"),
}
SHARE = 4  # how many times as often as each of the others


def most_frequent(rng: Random, size: int, turns: int) -> Session:
    """``size`` lines ``kind: value`` in random order, and a question on each kind."""
    kinds = rng.sample(sorted(KINDS), min(turns, len(KINDS)))
    often = {kind: rng.choice(KINDS[kind]) for kind in kinds}
    pool = [(kind, w) for kind in kinds for w in (*KINDS[kind], *[often[kind]] * (SHARE - 1))]
    lines = (pool * -(-size // len(pool)))[: max(size, len(pool))]  # so that the share is right
    rng.shuffle(lines)
    asked = []
    for turn in range(turns):
        kind = kinds[turn % len(kinds)]
        others = [w for w in KINDS[kind] if w != often[kind]]
        choices = tuple(f" {w}\n" for w in (often[kind], *others))
        asked.append(Turn(f"most frequent {kind}:", choices[0], "", choices))
    return Session("".join(f"{kind}: {word}\n" for kind, word in lines), tuple(asked))
