from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import SHAPES, Sequence, every_head, make_facts, top

from quire.errors import InvalidRequestError
from quire.kv.select.h2o import HeavyHitters


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [1, 9, 10, 33])
@pytest.mark.parametrize("fair", [False, True])
def test_like_the_paper_token_by_token(
    heads: int, kv_heads: int, dtype: torch.dtype, prompt: int, fair: bool
) -> None:
    """One entry out for each that comes: the least mass outside the newest."""
    facts = make_facts(heads, kv_heads, dtype=dtype)
    budget, recent = 10, 4
    method = HeavyHitters(budget, recent, fair, every=1)
    history = Sequence.make(facts, prompt, prompt + 12).decode(method)

    mine = Sequence.make(facts, prompt, prompt + 12)

    def score(layer: int, head: int, token: int) -> float:
        rows = mine.tokens - token if fair else 1
        return mine.mass[layer][head][token] / rows

    def drop(layer: int, head: int) -> None:
        held = mine.held[layer][head]
        if len(held) > budget:
            old = held[:-recent]
            good = top(old, lambda t: score(layer, head, t), budget - recent)
            mine.held[layer][head] = good + held[-recent:]

    for place in every_head(facts):
        drop(*place)
    for held in history:
        mine.step()
        for layer, head in every_head(facts):
            if len(mine.held[layer][head]) > budget:  # the online rule: one victim
                candidates = mine.held[layer][head][:-recent]
                victim = min(candidates, key=lambda t: score(layer, head, t))
                mine.held[layer][head].remove(victim)
            assert mine.held[layer][head] == held[layer][head]
            assert len(held[layer][head]) == min(budget, mine.tokens)


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.integers(1, 40),
    budget=st.integers(1, 50),
    recent=st.one_of(st.integers(0, 60), st.sampled_from([0.0, 0.5, 1.0])),
    every=st.one_of(st.none(), st.integers(1, 6)),
)
def test_what_always_holds(prompt: int, budget: int, recent: float, every: int | None) -> None:
    facts = make_facts(2, 2, layers=1)
    sequence = Sequence.make(facts, prompt, prompt + 8)
    before = sequence.seen()
    chosen = HeavyHitters(budget, recent, every=every).select(before)
    assert (chosen is None) == (prompt <= budget)
    history = sequence.decode(HeavyHitters(budget, recent, every=every))
    newest = recent if isinstance(recent, int) else round(recent * budget)
    for step, held in enumerate(history):
        for tokens in held[0]:
            fresh = step + 1 if every is None else (step + 1) % every
            assert len(tokens) <= budget + fresh
            last = tokens[len(tokens) - min(len(tokens), min(newest, budget) + fresh) :]
            assert last == list(range(prompt + step + 1 - len(last), prompt + step + 1))


def test_a_recent_budget_is_a_window() -> None:
    sequence = Sequence.make(make_facts(), 30, 40)
    assert sequence.decode(HeavyHitters(6, 1.0, every=1))[-1][1][0] == list(range(34, 40))


def test_constant_scores_keep_the_newest() -> None:
    facts = make_facts(layers=1)
    sequence = Sequence.make(facts, 12)
    sequence.mass = [[dict.fromkeys(range(12), 1.0)]]
    sequence.keep(HeavyHitters(5, 2).select(sequence.seen()))
    assert sequence.held == [[[7, 8, 9, 10, 11]]]


@pytest.mark.parametrize("options", [{"budget": 2.0}, {"recent": -1}, {"every": 0}])
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        HeavyHitters(**options)  # type: ignore[arg-type]
