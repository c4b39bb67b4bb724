"""String retrieval: the value of a key in a long list (SCBench's kv).

Answers are written freely; right is the whole value with its line's end.
"""

from __future__ import annotations

from random import Random

from quire.bench.kv.session import Session, Turn
from quire.bench.kv.tasks.words import common_words


def key_value(rng: Random, size: int, turns: int) -> Session:
    """``size`` lines ``key: value``, and then keys again."""
    words = rng.sample(common_words(), len(common_words()))
    keys: dict[str, str] = {}
    while len(keys) < max(size, turns):
        last = words[len(keys) % len(words)]  # no key ends as another, as long as words last
        keys.setdefault(f"{rng.choice(words)} {last}", rng.choice(words))
    lines = list(keys.items())
    asked = rng.sample(lines, turns)
    return Session(
        "".join(f"{key}: {value}\n" for key, value in lines),
        tuple(Turn(f"{key}:", f" {value}\n") for key, value in asked),
    )
