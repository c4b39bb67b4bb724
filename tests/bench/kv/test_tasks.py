from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.api.setup import model_folder
from quire.bench.kv.session import Session, cut_tokens, fit
from quire.bench.kv.suite import TASKS, TURNS, Suite, make_suite
from quire.bench.kv.tasks.most_frequent import KINDS
from quire.errors import InvalidRequestError
from quire.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(model_folder("demo"))


def session(task: str, seed: int, size: int = 40, turns: int = TURNS) -> Session:
    return TASKS[task](Random(seed), size, turns)


@pytest.mark.parametrize("task", list(TASKS))
def test_tasks_are_made_from_their_seed_alone(task: str) -> None:
    assert session(task, 3) == session(task, 3)
    assert session(task, 3) != session(task, 4)


@pytest.mark.parametrize("task", list(TASKS))
@given(seed=st.integers(0, 1000), size=st.integers(1, 80), turns=st.integers(1, 5))
def test_the_right_answer_is_among_the_choices(task: str, seed: int, size: int, turns: int) -> None:
    made = session(task, seed, size, turns)
    assert len(made.turns) == turns
    for turn in made.turns:
        assert not turn.question.endswith(" ")
        assert turn.answer.startswith(" ")
        if turn.choices:
            assert turn.choices[0] == turn.answer
            assert len(set(turn.choices)) == len(turn.choices) == 4


@given(seed=st.integers(0, 1000), size=st.integers(1, 1000))
def test_keys_are_in_the_list_once(seed: int, size: int) -> None:
    made = session("kv", seed, size)
    lines = made.context.splitlines()
    assert len(lines) == max(size, TURNS)
    assert len({line.split(":")[0] for line in lines}) == len(lines)
    for turn in made.turns:
        assert f"{turn.question}{turn.answer}".strip() in lines


@given(seed=st.integers(0, 1000), size=st.integers(1, 60))
def test_facts_are_in_the_prose(seed: int, size: int) -> None:
    for turn in session("needle", seed, size).turns:
        stem = turn.question.split("Answer: ")[1]
        assert session("needle", seed, size).context.count(stem + turn.answer) == 1


@given(seed=st.integers(0, 1000), size=st.integers(1, 60))
def test_one_string_has_both_ends(seed: int, size: int) -> None:
    made = session("prefix-suffix", seed, size)
    lines = [line.removeprefix("- ").split() for line in made.context.splitlines()]
    for turn in made.turns:
        prefix = turn.question.split()[-1]
        middle, suffix = turn.answer.split()
        assert [line for line in lines if line[0] == prefix and line[2] == suffix] == [
            [prefix, middle, suffix]
        ]
        assert sum(line[0] == prefix for line in lines) == 4
        assert all([prefix, *choice.split()] in lines for choice in turn.choices[:1])


@given(seed=st.integers(0, 1000), size=st.integers(1, 60))
def test_chains_lead_to_the_answer(seed: int, size: int) -> None:
    made = session("variables", seed, size)
    ends = set()
    for turn in made.turns:
        name = turn.question.split()[-2]
        (first,) = (w for w in _values(made.context, name))
        (value,) = (w for w in _values(made.context, first))
        assert turn.answer.strip() == f"{value}."
        ends.add(value)
    assert len(ends) == len(made.turns)


def _values(text: str, name: str) -> list[str]:
    words = text.split()
    return [
        words[i + 2].rstrip(".") for i, w in enumerate(words) if w == name and words[i + 1] == "="
    ]


@given(seed=st.integers(0, 1000), size=st.integers(100, 200))
def test_examples_tell_the_class(seed: int, size: int) -> None:
    made = session("many-shot", seed, size)
    labels: dict[str, set[str]] = {}
    for line in made.context.splitlines():
        example, label = line.split(": ")
        labels.setdefault(example.split()[1], set()).add(label)
    assert all(len(names) == 1 for names in labels.values())
    for turn in made.turns:
        word = turn.question.rstrip(":").split()[1]
        assert labels.get(word, {turn.answer.strip()}) == {turn.answer.strip()}


@given(seed=st.integers(0, 1000), size=st.integers(1, 300), turns=st.integers(1, 5))
def test_the_answer_is_the_most_frequent(seed: int, size: int, turns: int) -> None:
    made = session("most-frequent", seed, size, turns)
    words = [line.split(": ") for line in made.context.splitlines()]
    for turn in made.turns:
        kind = turn.question.rstrip(":").split()[-1]
        counts = {word: words.count([kind, word]) for word in KINDS[kind]}
        best = counts.pop(turn.answer.strip())
        assert all(best > count for count in counts.values())


@given(seed=st.integers(0, 100), turns=st.integers(1, 6))
def test_mixed_sessions_take_turns(seed: int, turns: int) -> None:
    made = session("mixed", seed, 40, turns)
    assert [bool(turn.choices) for turn in made.turns] == [bool(i % 2) for i in range(turns)]


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_lengths_are_within_five_percent(task: str, length: int, tokenizer: Tokenizer) -> None:
    for seed in range(3):
        made = fit(lambda size, seed=seed: session(task, seed, size), tokenizer.encode, length)
        assert 0.95 * length <= len(tokenizer.encode(made.text)) <= length


@given(
    st.lists(st.text("ab \n:", max_size=12), min_size=1, max_size=6).filter(lambda p: any(p)),
)
def test_parts_are_cut_where_they_meet(tokenizer: Tokenizer, parts: list[str]) -> None:
    cut = cut_tokens(tokenizer.encode, parts)
    assert len(cut) == len(parts)
    assert np.concatenate(cut).tolist() == tokenizer.encode("".join(parts))
    for index in range(len(parts)):  # what belongs to a part and before is within that text
        text = tokenizer.decode(np.concatenate(cut[: index + 1]).tolist())
        assert "".join(parts[: index + 1]).startswith(text)


@pytest.fixture(scope="module")
def suite(tokenizer: Tokenizer) -> Suite:
    return make_suite(tuple(TASKS), tokenizer.encode, length=512, samples=2, seed=5)


def test_spans_are_the_answers(suite: Suite, tokenizer: Tokenizer) -> None:
    lengths = [len(s.prompt) + len(s.given) for s in suite.scripts]
    assert max(lengths) <= 512
    judged = 0
    for script, questions in zip(suite.scripts, suite.questions, strict=True):
        if not questions:
            assert script.spread
            assert len(script.prompt) + len(script.given) == 512
            continue
        assert len(script.spans) == len(questions)
        for span, question in zip(script.spans, questions, strict=True):
            judged += 1
            answer = tokenizer.decode(script.given[span.start : span.stop].tolist())
            assert answer[0] == " "
            assert answer[-1] in ".\n"
            assert question.chance == (1 / len(span.choices) if span.choices else 0)
            if span.choices:
                assert span.choices[0] == script.given[span.start]
                assert len(set(span.choices)) == len(span.choices)
    assert judged == len(TASKS) * 2 * TURNS * 2


def test_both_modes_ask_the_same(suite: Suite, tokenizer: Tokenizer) -> None:
    size = TURNS + 1  # the requests of a session, then its conversation
    for first in range(0, size * len(TASKS) * 2, size):
        *requests, conversation = suite.scripts[first : first + size]
        assert conversation.prompt.tolist() == requests[0].prompt.tolist()
        text = tokenizer.decode([*conversation.prompt.tolist(), *conversation.given.tolist()])
        for script, span in zip(requests, conversation.spans, strict=True):
            given = conversation.given[span.start : span.stop]
            assert script.given.tolist() == given.tolist()
            assert tokenizer.decode(script.prompt[-3:].tolist()) in text
        shared = min(len(_common(requests[0].prompt, other.prompt)) for other in requests[1:])
        assert shared > 0.8 * len(requests[0].prompt)  # so that its KV is computed once


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = min(len(a), len(b))
    differs = (a[:size] != b[:size]).nonzero()[0]
    return a[: differs[0]] if len(differs) else a[:size]


def test_the_same_seed_gives_the_same_suite(suite: Suite, tokenizer: Tokenizer) -> None:
    again = make_suite(tuple(TASKS), tokenizer.encode, length=512, samples=2, seed=5)
    assert _bytes(again) == _bytes(suite)
    other = make_suite(tuple(TASKS), tokenizer.encode, length=512, samples=2, seed=6)
    assert _bytes(other) != _bytes(suite)
    assert again.questions == suite.questions


def _bytes(suite: Suite) -> list[tuple[bytes, bytes]]:
    return [(s.prompt.tobytes(), s.given.tobytes()) for s in suite.scripts]


def test_too_short_lengths_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="40 tokens are too few for the task needle"):
        make_suite(("needle",), tokenizer.encode, length=40, samples=1, seed=0)


def test_choices_that_begin_alike_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="same token"):
        make_suite(
            ("most-frequent",), lambda text: list(text.encode()), length=4000, samples=1, seed=0
        )
