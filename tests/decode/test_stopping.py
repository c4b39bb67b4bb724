from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.decode.params import SamplingParams
from quire.decode.stopping import StopStrings, finish_reason


def test_reasons() -> None:
    params = SamplingParams(max_tokens=3, stop_token_ids=(7,))
    assert finish_reason(params, [1], (0,)) is None
    assert finish_reason(params, [1, 0], (0,)) == "stop"
    assert finish_reason(params, [7], (0,)) == "stop"
    assert finish_reason(params, [1, 1, 1], (0,)) == "length"
    assert finish_reason(SamplingParams(ignore_eos=True), [0], (0,)) is None


@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 5), max_size=30),
)
def test_stop_strings_are_found_where_they_begin(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    watcher = StopStrings(tuple(stop))
    at = 0
    for cut in [*cuts, 30]:
        piece, at = text[at : at + cut], at + cut
        found = watcher.feed(piece)
        seen = text[:at]
        expected = [i for i in (seen.find(s) for s in stop) if i >= 0]
        assert found == (min(expected) if expected else None)
        if found is not None or at >= len(text):
            return
