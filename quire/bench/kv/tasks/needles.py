"""String retrieval: facts planted in prose (needles, as in RULER, arXiv 2404.06654).

Answers are written freely; right is the whole value with its full stop.
"""

from __future__ import annotations

from random import Random

from quire.bench import recall
from quire.bench.kv.session import Session, Turn
from quire.bench.kv.tasks.words import sentences


def needles(rng: Random, size: int, turns: int) -> Session:
    """``turns`` facts in ``size`` sentences of prose, and a question on each."""
    facts = recall.make_facts(rng, turns)
    prose = sentences()
    start = rng.randrange(len(prose))
    filler = [prose[(start + i) % len(prose)] for i in range(size)]
    context = recall.plant(rng, facts, filler)
    rng.shuffle(facts)
    return Session(f"{context}\n\n", tuple(needle_turn(fact) for fact in facts))


def needle_turn(fact: recall.Fact) -> Turn:
    """The question on a fact."""
    return Turn(f"Question: {fact.question}\nAnswer: {fact.stem}", f" {fact.value}.", "\n\n")
