"""In-context recall tasks: text in which facts are planted, and questions about them.

The demonstration model is trained on these tasks and judged by them; KV-cache methods are judged
by the same ones. A task is pure text (no tokenizer, no tensors), made from a seeded
``random.Random``, so the same seed gives the same task on every machine.

Sources: needle-in-a-haystack retrieval as in RULER (arXiv 2404.06654); dense key-value recall as
in multi-query associative recall (arXiv 2312.04927).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

NAMES = (
    "Alice Arthur Charles Edward Emma Frank George Harry Helen Henry Jack James Jane John Joseph "
    "Kate Lucy Margaret Martin Mary Michael Oliver Paul Peter Philip Richard Robert Rose Sarah "
    "Simon Sophia Stephen Susan Thomas Tom Walter William David Daniel Anna Elizabeth Julia Laura "
    "Rachel Ruth Samuel Adam Hugh Agnes Martha Clara Edith Ellen Fanny Grace Hannah Isaac Jacob"
).split()

ATTRIBUTES = (
    "secret word|favourite food|hidden treasure|lucky charm|chosen animal|family trade|"
    "greatest fear|first gift|best friend's gift|lost object|password|dearest wish|"
    "winter home|old nickname|stolen goods|morning drink|garden flower|ship's name|"
    "horse's name|last word"
).split("|")

VALUES = (
    "apple arrow bread bridge butter candle castle chair church cloud coffee copper corner cotton "
    "crown desert diamond doctor dragon eagle engine feather finger fire flower forest garden "
    "ghost glass gold grass hammer harbour heart hill honey horse island ivory jewel king knife "
    "ladder lamp leaf letter lion market meadow milk mirror money moon morning mountain music "
    "needle night ocean orange palace paper pearl pepper picture pipe potato powder prince queen "
    "rabbit rain ribbon river road rose salt sand school shadow sheep ship silk silver sister snow "
    "soldier spring stone storm stranger sugar summer sword table temple thunder tiger tower tree "
    "valley velvet village violin wagon water wheat wheel window winter wolf wood wool"
).split()


@dataclass(frozen=True)
class Fact:
    """One planted statement. ``stem`` followed by `` value.`` is the statement."""

    attribute: str
    name: str
    value: str

    @property
    def stem(self) -> str:
        """The statement up to the value."""
        return f"The {self.attribute} of {self.name} is"

    @property
    def statement(self) -> str:
        """The whole sentence."""
        return f"{self.stem} {self.value}."

    @property
    def question(self) -> str:
        """What the fact answers."""
        return f"What is the {self.attribute} of {self.name}?"


def make_facts(
    rng: Random,
    count: int,
    attributes: Sequence[str] = ATTRIBUTES,
    names: Sequence[str] = NAMES,
    values: Sequence[str] = VALUES,
) -> list[Fact]:
    """``count`` facts; no (attribute, name) pair twice, so each question has one answer."""
    if count > len(attributes) * len(names):
        raise ValueError(f"{count} facts asked of {len(attributes)} x {len(names)} pairs")
    facts: dict[tuple[str, str], Fact] = {}
    while len(facts) < count:
        pair = (rng.choice(attributes), rng.choice(names))
        facts.setdefault(pair, Fact(*pair, rng.choice(values)))
    return list(facts.values())


def plant(rng: Random, facts: Sequence[Fact], sentences: Sequence[str]) -> str:
    """Text of ``sentences`` with each fact's statement put between two of them at random."""
    places = sorted(rng.randrange(len(sentences) + 1) for _ in facts)
    pieces: list[str] = []
    start = 0
    for place, fact in zip(places, facts, strict=True):
        pieces.extend(sentences[start:place])
        pieces.append(fact.statement)
        start = place
    pieces.extend(sentences[start:])
    return " ".join(pieces)


def question_prompt(context: str, fact: Fact) -> str:
    """A prompt whose right continuation is `` value.``"""
    return f"{context}\n\nQuestion: {fact.question}\nAnswer: {fact.stem}"
