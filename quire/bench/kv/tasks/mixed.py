"""Mixed: needles and classification on one context, in turn (SCBench's multi-task sessions).

Each turn has its own task's rule.
"""

from __future__ import annotations

from random import Random

from quire.bench.kv.session import Session
from quire.bench.kv.tasks.many_shot import many_shot
from quire.bench.kv.tasks.needles import needles


def mixed(rng: Random, size: int, turns: int) -> Session:
    """Prose with needles, then labelled examples; a question on the first, the second, ..."""
    prose = needles(rng, max(1, size // 2), (turns + 1) // 2)
    shots = many_shot(rng, max(1, size - size // 2), max(1, turns // 2))
    pairs = [prose.turns, shots.turns]
    asked = tuple(pairs[turn % 2][turn // 2] for turn in range(turns))
    return Session(f"{prose.context}{shots.context}\n", asked)
