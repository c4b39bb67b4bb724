from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from quire.jobs.results import Ordered


@given(order=st.permutations(range(7)), stop=st.integers(0, 7))
def test_lines_come_in_input_order_as_early_as_possible(order: list[int], stop: int) -> None:
    written: list[str] = []
    out = Ordered(written.append, by_input=True)
    for count, index in enumerate(order[:stop], start=1):
        out.put(index, {"i": index})
        ready = next((i for i in range(8) if i not in order[:count]), 7)
        assert [json.loads(line)["i"] for line in written] == list(range(ready))
    out.flush_early()
    assert sorted(json.loads(line)["i"] for line in written) == sorted(order[:stop])


def test_completion_order_writes_at_once() -> None:
    written: list[str] = []
    out = Ordered(written.append, by_input=False)
    out.put(2, {"i": "ü"})
    assert written == ['{"i": "ü"}\n']
