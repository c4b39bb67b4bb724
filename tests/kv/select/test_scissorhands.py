from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import SHAPES, Sequence, every_head, make_facts, top

from quire.errors import InvalidRequestError
from quire.kv.select.scissorhands import Persistence, ignored


def low(sequence: Sequence, layer: int, head: int, window: int) -> dict[int, int]:
    """How often the last queries gave a held token less than the uniform share."""
    facts = sequence.facts
    count = dict.fromkeys(sequence.held[layer][head], 0)
    for token in range(max(0, sequence.tokens - window), sequence.tokens):
        queries = range(head * facts.group, (head + 1) * facts.group)
        rows = [sequence.weights(layer, query, token) for query in queries]
        for key in rows[0]:
            alpha = sum(row[key] for row in rows) / facts.group
            count[key] += alpha < 1 / len(rows[0])
    return count


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("window", [1, 5, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_counts(heads: int, kv_heads: int, window: int, softcap: float | None) -> None:
    facts = make_facts(heads, kv_heads, softcap=softcap)
    sequence = Sequence.make(facts, 30)
    for layer, head in every_head(facts):  # not all are there any more, and not equally many
        for token in range(head, 20, 3 + head):
            sequence.held[layer][head].remove(token)
    seen = sequence.seen(window)
    for layer in range(facts.layers):
        entries = seen.entries(layer)
        found = ignored(facts, seen.queries(layer), entries, seen.tokens)
        for head in range(kv_heads):
            wanted = list(low(sequence, layer, head, window).values())
            assert found[head, : len(wanted)].tolist() == wanted


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("every", [1, 4])
def test_overflow_by_overflow(heads: int, kv_heads: int, every: int) -> None:
    facts = make_facts(heads, kv_heads)
    method = Persistence(12, window=6, recent=3, drop=0.5, tilt=0.0, every=every)
    history = Sequence.make(facts, 20, 50).decode(method)

    mine = Sequence.make(facts, 20, 50)
    compressions = 0

    def look() -> None:
        nonlocal compressions
        for layer, head in every_head(facts):
            held = mine.held[layer][head]
            if len(held) > 12:
                compressions += 1
                count = low(mine, layer, head, 6)
                good = top(held[:-3], lambda t, count=count: -count[t], 6 - 3)  # type: ignore[misc]
                mine.held[layer][head] = good + held[-3:]

    look()
    for step, held in enumerate(history):
        mine.step()
        if (step + 1) % every == 0:
            look()
        assert held == mine.held
    assert 30 // 7 <= compressions // (facts.layers * kv_heads) <= 30 // 6 + 1


def test_later_layers_get_more_under_the_same_total() -> None:
    facts = make_facts(layers=4)
    sequence = Sequence.make(facts, 64)
    sequence.keep(Persistence(16, drop=0.0, tilt=0.5).select(sequence.seen(400)))
    sizes = [len(heads[0]) for heads in sequence.held]
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]
    assert sum(sizes) == 4 * 16


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.integers(1, 40),
    budget=st.one_of(st.integers(1, 50), st.sampled_from([0.2, 1.0])),
    recent=st.integers(0, 60),
    drop=st.sampled_from([0.0, 0.5, 0.99]),
    tilt=st.sampled_from([-0.5, 0.0, 0.5]),
)
def test_what_always_holds(
    prompt: int, budget: float, recent: int, drop: float, tilt: float
) -> None:
    facts = make_facts(2, 2)
    method = Persistence(budget, 7, recent, drop, tilt, every=1)
    history = Sequence.make(facts, prompt, prompt + 10).decode(method)
    most = budget if isinstance(budget, int) else max(1, round(budget * prompt))
    for step, held in enumerate(history):
        for layer, head in every_head(facts):
            assert 1 <= len(held[layer][head]) <= most * (1 + abs(tilt)) + 1
            assert held[layer][head][-1] == prompt + step or recent == 0


def test_constant_keys_are_no_trouble() -> None:
    facts = make_facts()
    sequence = Sequence.make(facts, 20)
    sequence.keys = torch.zeros_like(sequence.keys)
    sequence.keep(Persistence(8, drop=0.0, tilt=0.0).select(sequence.seen(400)))
    assert [len(h) for heads in sequence.held for h in heads] == [8, 8]


@pytest.mark.parametrize(
    "options", [{"budget": 0.0}, {"window": 0}, {"drop": 1.0}, {"tilt": 1.0}, {"recent": -1}]
)
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        Persistence(**options)  # type: ignore[arg-type]
