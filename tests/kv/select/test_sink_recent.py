from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import Sequence, every_head, make_facts

from quire.errors import InvalidRequestError
from quire.kv.select.sink_recent import SinkRecent


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 40),
    budget=st.one_of(st.integers(1, 45), st.sampled_from([0.25, 0.5, 1.0])),
    sinks=st.integers(0, 6),
    every=st.integers(1, 5),
)
def test_first_and_newest(prompt: int, budget: float, sinks: int, every: int) -> None:
    facts = make_facts(kv_heads=2)
    sequence = Sequence.make(facts, prompt, prompt + 12)
    history = sequence.decode(SinkRecent(budget, sinks, every))
    most = budget if isinstance(budget, int) else max(1, round(budget * prompt))
    for step, held in enumerate(history):
        tokens = prompt + step + 1
        last = tokens - (step + 1) % every  # when it selected last
        kept = list(range(last))
        if last > most:
            head = min(sinks, most - 1)
            kept = kept[:head] + kept[last - (most - head) :]
            if last > prompt:  # what was dropped before is gone
                assert len(kept) == most
        wanted = kept + list(range(last, tokens))
        assert all(held[layer][head] == wanted for layer, head in every_head(facts))


def test_never_again() -> None:
    sequence = Sequence.make(make_facts(), 20, 40)
    held = sequence.decode(SinkRecent(8, 2, None))[-1][0][0]
    assert held == [0, 1, *range(14, 40)]


@pytest.mark.parametrize("options", [{"budget": 0}, {"sinks": -1}, {"every": 0}])
def test_wrong_options(options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        SinkRecent(**options)
