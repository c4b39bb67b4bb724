from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.decode.params import SamplingParams
from quire.decode.structure import Structure
from quire.jobs.rows import BadRow, Row, RowParser


def parser(warned: list[str] | None = None) -> RowParser:
    said = warned if warned is not None else []
    return RowParser(SamplingParams(max_tokens=9), frozenset({"demo"}), said.append)


def read(record: object) -> Row | BadRow:
    return parser().parse(4, json.dumps(record))


def good(record: object) -> Row:
    found = read(record)
    assert isinstance(found, Row), found
    return found


def test_openai_batch_lines() -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    row = good(line)
    assert (row.line, row.custom_id, row.kind) == (4, "a", "chat")
    assert row.prompt == {"messages": body["messages"]}
    assert row.params.max_tokens == 3
    row = good({"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "x"}})
    assert (row.kind, row.prompt, row.params.max_tokens) == ("completion", {"prompt": "x"}, 9)


def test_plain_lines() -> None:
    assert good({"prompt": "x"}).custom_id == "line-4"
    assert good({"id": 5, "prompt": ["x"]}).custom_id == "5"
    assert good({"prompt_token_ids": [1, 2]}).prompt == {"prompt_token_ids": [1, 2]}
    assert good({"prompt": [1, 2]}).prompt == {"prompt_token_ids": [1, 2]}
    assert good({"messages": [{"role": "user", "content": "x"}]}).kind == "chat"


def test_sampling_fields() -> None:
    row = good({"prompt": "x", "temperature": 0, "logit_bias": {"7": -100}, "stop": "end", "n": 2})
    assert row.params.logit_bias == {7: -100}
    assert row.params.stop == ("end",)
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 4}
    assert good({**chat, "max_completion_tokens": 5}).params.max_tokens == 5
    assert good(chat).params.logprobs == 4
    assert good({**chat, "logprobs": False}).params.logprobs is None


SCHEMA = {"type": "object", "properties": {"a": {}}}


@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({"response_format": {"type": "json_object"}}, Structure("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            Structure("json_schema", json.dumps(SCHEMA)),
        ),
        ({"json_schema": SCHEMA}, Structure("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": SCHEMA}}, Structure("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"choice": ["a"]}}, Structure("choice", '["a"]')),
        ({"structure": {"regex": "a"}, "regex": None}, Structure("regex", "a")),
        ({"regex": "a"}, Structure("regex", "a")),
        ({"choice": ["a"]}, Structure("choice", '["a"]')),
        ({"grammar": "start: /a/"}, Structure("grammar", "start: /a/")),
        ({"response_format": {"type": "text"}}, None),
        ({}, Structure("regex", "default")),
        ({"response_format": None}, Structure("regex", "default")),
    ],
)
def test_structures(fields: dict[str, object], structure: Structure | None) -> None:
    defaults = SamplingParams(structure=Structure("regex", "default"))
    row = RowParser(defaults, frozenset(), print).read(1, {"prompt": "x", **fields})
    assert isinstance(row, Row)
    assert row.params.structure == structure


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ([], None),
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "model": "gpt-4"}, "model"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format"),
        ({"prompt": "x", "regex": "a", "choice": ["b"]}, "choice"),
        ({"prompt": "x", "regex": 5}, "regex"),
        ({"prompt": "x", "structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"prompt": "x", "guided_json": {}}, "guided_json"),
        ({"prompt": "x", "regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"prompt": "x", "stream": True}, "stream"),
        ({"prompt": "x", "custom_id": 1.5}, "custom_id"),
        ({"url": "/v1/embeddings", "body": {"input": "x"}}, "url"),
        ({"url": "/v1/completions", "body": "x"}, "body"),
        ({"url": "/v1/completions", "method": "GET", "body": {"prompt": "x"}}, "method"),
        ({"url": "/v1/chat/completions", "body": {"prompt": "x"}}, "messages"),
        ({"prompt_token_ids": ["a"]}, "prompt_token_ids"),
    ],
)
def test_bad_rows_name_the_field(record: object, field: str | None) -> None:
    found = read(record)
    assert isinstance(found, BadRow)
    assert found.line == 4
    assert found.error.field == field


def test_unknown_fields_are_warned_of_once() -> None:
    said: list[str] = []
    parse = parser(said).parse
    for line in range(3):
        assert isinstance(parse(line, '{"prompt": "x", "colour": 1, "user": "me"}'), Row)
    assert said == ["The field 'colour' is unknown and has no effect."]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = ["prompt", "messages", "prompt_token_ids", "url", "body", "custom_id", "id", "method"]
NAMES = [
    *FIELDS,
    "response_format",
    "structured_outputs",
    "regex",
    "choice",
    "temperature",
    "n",
    "stop",
    "logit_bias",
    "logprobs",
    "seed",
    "max_tokens",
    "model",
]


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6) | JSON | st.text(max_size=30))
def test_no_line_raises(record: object) -> None:
    text = record if isinstance(record, str) else json.dumps(record)
    assert isinstance(parser().parse(1, text), (Row, BadRow))
