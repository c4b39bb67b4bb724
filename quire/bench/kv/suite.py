"""The suite: all tasks, as scripts of given tokens in both modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from quire.bench.kv.forced import Script, Span
from quire.bench.kv.session import Encode, Make, Session, cut_tokens, fit, held_out
from quire.bench.kv.tasks.key_value import key_value
from quire.bench.kv.tasks.many_shot import many_shot
from quire.bench.kv.tasks.mixed import mixed
from quire.bench.kv.tasks.most_frequent import most_frequent
from quire.bench.kv.tasks.needles import needles
from quire.bench.kv.tasks.prefix_suffix import prefix_suffix
from quire.bench.kv.tasks.variables import variables
from quire.errors import InvalidRequestError
from quire.kv.tree import Tokens

TASKS: dict[str, Make] = {
    "kv": key_value,
    "needle": needles,
    "prefix-suffix": prefix_suffix,
    "variables": variables,
    "many-shot": many_shot,
    "most-frequent": most_frequent,
    "mixed": mixed,
}
RETRIEVAL = ("kv", "needle")  # with one right answer that is written freely
MODES = ("requests", "turns")
TURNS = 4
TRIES = 50  # sessions that are made until the choices begin with different tokens
SCORED_TEXT = 128  # tokens of each window of prose, at most a quarter of it


@dataclass(frozen=True)
class Question:
    """What a judged span belongs to. ``turn`` from 1; ``chance``: of a right answer by chance."""

    task: str
    mode: str
    turn: int
    chance: float


@dataclass
class Suite:
    """Scripts, and the question that each of their spans is; those of the prose have none."""

    scripts: list[Script]
    questions: list[list[Question]]

    @property
    def tokens(self) -> int:
        """Tokens of all scripts, as if nothing were shared."""
        return sum(len(s.prompt) + len(s.given) for s in self.scripts)


def make_suite(
    tasks: Sequence[str], encode: Encode, *, length: int, samples: int, seed: int
) -> Suite:
    """``samples`` sessions of each task in both modes, and prose, all of ``length`` tokens.

    The same arguments give the same suite. Raises InvalidRequestError where ``length`` is too
    short for a task.
    """
    suite = Suite([], [])
    for task in tasks:
        for sample in range(samples):
            session, choices = _make(task, encode, length, f"{seed}/{task}/{length}/{sample}")
            chances = [1 / len(t.choices) if t.choices else 0.0 for t in session.turns]
            for turn, script in enumerate(_requests(session, choices, encode)):
                suite.scripts.append(script)
                suite.questions.append([Question(task, "requests", turn + 1, chances[turn])])
            suite.scripts.append(_conversation(session, choices, encode))
            suite.questions.append(
                [Question(task, "turns", turn + 1, chance) for turn, chance in enumerate(chances)]
            )
    for script in prose(encode, length, max(2, samples // 4)):
        suite.scripts.append(script)
        suite.questions.append([])
    return suite


def _make(
    task: str, encode: Encode, length: int, seed: str
) -> tuple[Session, list[tuple[int, ...]]]:
    """A session whose choices begin with different tokens, and those tokens."""
    for attempt in range(TRIES):
        session = _session(task, encode, length, f"{seed}/{attempt}")
        choices = _first_tokens(session, encode)
        if all(len(set(tokens)) == len(tokens) for tokens in choices):
            return session, choices
    raise InvalidRequestError(
        f"This tokenizer begins different answers of the task {task} with the same token.",
        field="task",
        value=task,
        action="Leave the task out.",
    )


def _session(task: str, encode: Encode, length: int, seed: str) -> Session:
    session = fit(lambda size: TASKS[task](Random(seed), size, TURNS), encode, length)
    if len(encode(session.text)) > length:
        raise InvalidRequestError(
            f"{length} tokens are too few for the task {task}.",
            field="length",
            value=length,
            action="Take a longer one.",
        )
    return session


def _first_tokens(session: Session, encode: Encode) -> list[tuple[int, ...]]:
    """The first token of every choice of every turn."""
    found = []
    for turn in session.turns:
        texts = [(turn.question, choice) for choice in turn.choices]
        found.append(tuple(int(cut_tokens(encode, pair)[1][0]) for pair in texts))
    return found


def _requests(session: Session, choices: list[tuple[int, ...]], encode: Encode) -> list[Script]:
    """Every turn as a request of its own on the shared context."""
    found = []
    for turn, first in zip(session.turns, choices, strict=True):
        prompt = session.context + turn.question
        before, answer = cut_tokens(encode, [prompt, turn.answer])
        found.append(Script(before, answer, (Span(0, len(answer), first),)))
    return found


def _conversation(session: Session, choices: list[tuple[int, ...]], encode: Encode) -> Script:
    """All turns in one sequence, the right answers in its history."""
    parts = [session.context]
    for turn in session.turns:
        parts += [turn.question, turn.answer, turn.end]
    context, *rest = cut_tokens(encode, parts)
    spans = []
    at = -len(rest[0])  # the first question belongs to the prompt
    for number, first in enumerate(choices):
        question, answer, end = (len(part) for part in rest[3 * number : 3 * number + 3])
        spans.append(Span(at + question, at + question + answer, first))
        at += question + answer + end
    given = np.concatenate(rest[1:])[: spans[-1].stop]
    return Script(np.concatenate([context, rest[0]]), given, tuple(spans))


def prose(encode: Encode, length: int, windows: int) -> list[Script]:
    """Windows of held-out prose, evenly spaced; the last tokens of each are judged."""
    scored = min(SCORED_TEXT, length // 4)
    found = []
    for tokens in text_windows(encode, length, windows):
        prompt, given = tokens[: length - scored], tokens[length - scored :]
        found.append(Script(prompt, given, (Span(0, scored),), spread=True))
    return found


def text_windows(encode: Encode, length: int, windows: int) -> list[Tokens]:
    """``windows`` stretches of the held-out prose; it begins again where it is too short."""
    text = np.array(encode(held_out()), dtype=np.int32)
    step = max(1, (len(text) - length) // windows)
    return [np.resize(np.roll(text, -i * step), length) for i in range(windows)]
