"""Words to make tasks of."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from quire.bench.kv.session import held_out


@cache
def sentences() -> tuple[str, ...]:
    """Sentences of prose of at most 20 words, in order: small enough to fill a length with."""
    text = re.sub(r"\s+", " ", held_out())
    return tuple(s for s in re.split(r"(?<=[.!?])\s+", text) if 3 <= len(s.split()) <= 20)


@cache
def common_words() -> tuple[str, ...]:
    """The 600 most frequent lower-case words of four letters and more, by frequency."""
    counts = Counter(re.findall(r"\b[a-z]{4,}\b", held_out()))
    return tuple(word for word, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:600])
