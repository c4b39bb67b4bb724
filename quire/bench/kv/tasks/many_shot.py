"""Many-shot in-context classification (SCBench's many-shot ICL).

Each class has words of its own, and an example is one of them after a word that says nothing. The
answer is the class, chosen among four: one in four by chance.
"""

from __future__ import annotations

from random import Random

from quire.bench.kv.session import Session, Turn
from quire.bench.kv.tasks.words import common_words

CLASSES = 4
OWN = 6  # words of a class


def many_shot(rng: Random, size: int, turns: int) -> Session:
    """``size`` labelled examples, and as many without label as there are turns."""
    words = rng.sample(common_words(), CLASSES * (OWN + 1))
    labels, own = words[:CLASSES], words[CLASSES:]
    asked, context = [], []
    for number in range(size + turns):
        which = rng.randrange(len(own)) if number >= turns else number * 7 % len(own)
        label = labels[which % CLASSES]
        example = f"{rng.choice(common_words())} {own[which]}:"
        if number >= turns:
            context.append(f"{example} {label}\n")
            continue
        others = [name for name in labels if name != label]
        choices = tuple(f" {name}\n" for name in (label, *others))
        asked.append(Turn(example, choices[0], "", choices))
    return Session("".join(context), tuple(asked))
