"""String retrieval: the value of a key in a long list (SCBench's kv).

Answers are written freely; right is the whole value. Keys are one word as long as there are words.
"""

from __future__ import annotations

from random import Random

from quire.bench.kv.session import Session, Turn
from quire.bench.kv.tasks.words import common_words


def key_value(rng: Random, size: int, turns: int) -> Session:
    """``size`` lines ``key: value``, and then keys again."""
    words = common_words()
    size = max(size, turns)
    last = [w for _ in range(-(-size // len(words))) for w in rng.sample(words, len(words))]
    keys = {f"{rng.choice(words)} {word}": rng.choice(words) for word in last[:size]}
    asked = rng.sample(sorted(keys), turns)
    return Session(
        "".join(f"{key}: {value}\n" for key, value in keys.items()),
        tuple(Turn(f"{key}:", f" {keys[key]}\n") for key in asked),
    )
