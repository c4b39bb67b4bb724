from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quire.api.outputs import CompletionOutput, RequestOutput
from quire.decode.params import SamplingParams
from quire.errors import PromptTooLongError
from quire.jobs.dedupe import Seen, sharing_key
from quire.jobs.results import copied_line, result_line, to_json
from quire.jobs.rows import Row

ROW = Row(
    4, "in.jsonl", 5, "line-5", "mine", "chat", {"prompt": "a"}, SamplingParams(temperature=0)
)
OTHER = replace(ROW, index=7, line=9, name="line-9", custom_id="its", file="b.jsonl")


def answer(cached: int, error: bool = False) -> RequestOutput:
    output = RequestOutput(0, "a", [1, 2, 3], cached_tokens=cached)
    if error:
        output.error = PromptTooLongError("Too long.", field="prompt")
    else:
        output.outputs = [CompletionOutput(0, "ü", [4, 5], None, None, "stop")]
    return output


@pytest.mark.parametrize("error", [False, True])
def test_a_copied_line_is_the_other_row_s_own(error: bool) -> None:
    """Equal to what computing it would have given with the whole prompt cached."""
    first = to_json(result_line(ROW, answer(1, error), "demo", str, 77))
    own = result_line(OTHER, answer(3, error), "demo", str, 77)
    assert to_json(copied_line(first, OTHER)) == to_json(own)


def test_lines_are_valid_utf8_whatever_is_in_them() -> None:
    line = {"custom_id": "half \ud800", "text": "ü"}
    assert json.loads(to_json(line).encode()) == line
    assert to_json({"text": "ü"}) == '{"text": "ü"}'


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "completion"},
        {"prompt": {"prompt": "b"}},
        {"prompt": {"prompt_token_ids": [1]}},
        {"params": SamplingParams(temperature=0, max_tokens=5)},
        {"params": SamplingParams(temperature=0, n=2)},
        {"params": SamplingParams(seed=1)},
    ],
)
def test_keys_of_rows_with_other_answers_differ(change: dict) -> None:
    assert sharing_key(replace(ROW, **change)) != sharing_key(ROW)


def test_keys_of_equal_rows() -> None:
    assert sharing_key(OTHER) == sharing_key(ROW)
    assert len(sharing_key(ROW) or b"") == 16
    assert sharing_key(replace(ROW, params=SamplingParams())) is None  # sampled
    seeded = replace(ROW, params=SamplingParams(seed=1))
    assert sharing_key(seeded) == sharing_key(replace(OTHER, params=SamplingParams(seed=1)))
    assert sharing_key(replace(ROW, prompt={"prompt": "\ud800"})) is not None


def test_seen_finds_the_row_of_a_key_and_never_of_another() -> None:
    seen = Seen(slots=4)
    keys = [bytes([i, 0, 0, 0, 0, 0, 0, 0, i // 16]) + bytes(7) for i in range(40)]
    for index, key in enumerate(keys):
        assert seen.find(key) is None
        seen.note(key, index)
        assert seen.find(key) == index
    found = [seen.find(key) for key in keys]
    assert found == [None] * 36 + [36, 37, 38, 39]
    seen.note(keys[39], 3)
    assert seen.find(keys[39]) == 3
    assert Seen(4).find(bytes(16)) is None
