from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.decode.params import SamplingParams
from quire.decode.structure import Structure
from quire.errors import InvalidRequestError
from quire.jobs.records import Record
from quire.jobs.rows import BadRow, Row, RowParser
from quire.jobs.template import Template


def parser(warned: list[str] | None = None, template: str | None = None) -> RowParser:
    said = warned if warned is not None else []
    made = Template(template) if template is not None else None
    return RowParser(SamplingParams(max_tokens=9), frozenset({"demo"}), said.append, made)


def record(raw: Any) -> Record:
    return Record(3, "in.jsonl", 4, "line-4", raw)


def read(line: object) -> Row | BadRow:
    return parser().read(record(json.dumps(line).encode()))


def columns(**values: Any) -> Row | BadRow:
    return parser().read(record(values))


def good(line: object) -> Row:
    found = read(line)
    assert isinstance(found, Row), found
    return found


def test_openai_batch_lines() -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    row = good(line)
    assert (row.index, row.file, row.line, row.name) == (3, "in.jsonl", 4, "line-4")
    assert (row.custom_id, row.kind) == ("a", "chat")
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


def test_equal_values_of_other_types_are_not_taken_for_each_other() -> None:
    read = parser().read
    assert isinstance(read(record(b'{"prompt": "x", "n": 1, "logit_bias": {"1": 1}}')), Row)
    assert isinstance(read(record(b'{"prompt": "x", "n": true}')), BadRow)
    assert isinstance(read(record(b'{"prompt": "x", "n": 1.0}')), BadRow)
    bias = b'{"prompt": "x", "n": 1, "logit_bias": {"1": true}}'
    assert isinstance(read(record(bias)), BadRow)
    found = [read(record(b'{"prompt": "x", "seed": %d}' % (i % 1200))) for i in range(3000)]
    assert [row.params.seed for row in found if isinstance(row, Row)] == [
        i % 1200 for i in range(3000)
    ]


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
    row = RowParser(defaults, frozenset(), print).read(
        record(json.dumps({"prompt": "x", **fields}).encode())
    )
    assert isinstance(row, Row)
    assert row.params.structure == structure


@pytest.mark.parametrize(
    ("line", "field"),
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
def test_bad_rows_name_the_field(line: object, field: str | None) -> None:
    found = read(line)
    assert isinstance(found, BadRow)
    assert found.line == 4
    assert found.error.field == field


def test_unknown_fields_are_warned_of_once() -> None:
    said: list[str] = []
    read = parser(said).read
    for _ in range(3):
        assert isinstance(read(record(b'{"prompt": "x", "colour": 1, "user": "me"}')), Row)
    assert said == ["The field 'colour' is unknown and has no effect."]
    for i in range(100):
        read(record(b'{"prompt": "x", "field %d": 1}' % i))
    assert len(said) == 21
    assert "more unknown fields" in said[-1]


def test_columns_are_used_like_fields() -> None:
    row = columns(prompt="x", max_tokens="5", temperature="0.5", seed="", stop="END", n=None)
    assert isinstance(row, Row)
    assert (row.params.max_tokens, row.params.temperature, row.params.seed) == (5, 0.5, None)
    assert row.params.stop == ("END",)
    row = columns(
        prompt="[1, 2]",
        stop='["a", "b"]',
        logit_bias='{"5": 1}',
        ignore_eos="True",
        max_tokens=20.0,
        temperature=Decimal("0.7"),
        top_p=float("nan"),
        id=17.0,
    )
    assert isinstance(row, Row)
    assert row.prompt == {"prompt": "[1, 2]"}
    assert row.custom_id == "17"
    assert row.params.stop == ("a", "b")
    assert row.params.logit_bias == {5: 1}
    assert row.params.ignore_eos
    assert (row.params.max_tokens, row.params.temperature) == (20, 0.7)


def test_nested_columns() -> None:
    message = {"role": "user", "content": "x", "tool_calls": None}
    row = columns(messages=[message], logit_bias=[("5", 1.0), ("6", None)], prompt=None)
    assert isinstance(row, Row)
    assert row.prompt == {"messages": [{"role": "user", "content": "x"}]}
    assert row.params.logit_bias == {5: 1.0}
    row = columns(messages=json.dumps([message]))
    assert isinstance(row, Row)
    body = {"prompt": "x", "max_tokens": 3}
    row = columns(url="/v1/completions", body=json.dumps(body), method="POST", custom_id=Decimal(5))
    assert isinstance(row, Row)
    assert (row.params.max_tokens, row.custom_id) == (3, "5")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None, "x": 1}, "prompt"),
        ({"prompt": b"x"}, "prompt"),
        ({"prompt": float("nan")}, "prompt"),
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_tokens"),
        ({"prompt": "x", "max_tokens": float("inf")}, "max_tokens"),
        ({"prompt": "x", "seed": datetime(2024, 1, 1)}, "seed"),
        ({"messages": "hello"}, "messages"),
        ({"prompt": "x", "custom_id": 1.5}, "custom_id"),
        ({"prompt": "x", "custom_id": [1]}, "custom_id"),
    ],
)
def test_bad_columns_name_the_field(values: dict[str, Any], field: str) -> None:
    found = columns(**values)
    assert isinstance(found, BadRow)
    assert found.error.field == field


@pytest.mark.parametrize("raw", [b'{"a": "x", "n": 99999, "id": 5}', {"a": "x", "n": "?", "id": 5}])
def test_a_template_makes_the_prompt_and_nothing_else_counts(raw: Any) -> None:
    said: list[str] = []
    row = parser(said, "<{{ a }}>").read(record(raw))
    assert isinstance(row, Row)
    assert (row.prompt, row.custom_id, row.params.n) == ({"prompt": "<x>"}, "5", 1)
    assert said == []


@pytest.mark.parametrize(
    ("raw", "field"),
    [(b"{}", "template"), (b"[]", None), (b'{"a": ""}', "prompt"), ({"a": None}, "prompt")],
)
def test_what_a_template_cannot_use(raw: Any, field: str | None) -> None:
    found = parser(template="{{ a }}").read(record(raw))
    assert isinstance(found, BadRow)
    assert found.error.field == field


def test_a_record_that_could_not_be_read_is_a_bad_row() -> None:
    error = InvalidRequestError("The file ends here.")
    found = parser().read(record(error))
    assert isinstance(found, BadRow)
    assert found.error is error


@pytest.mark.parametrize(
    "raw", [b"\xff", b"{", b"nul", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 10**6, b'{"a": "\x01"}']
)
def test_bytes_that_are_not_json(raw: bytes) -> None:
    found = parser().read(record(raw))
    assert isinstance(found, BadRow)
    assert len(str(found.error)) < 200


def test_errors_do_not_repeat_a_long_value() -> None:
    long = "x" * 10**6
    for line in ({"url": long}, {"prompt": "x", "model": long}, {"prompt": "x", "stop": [long, 1]}):
        found = read(line)
        assert isinstance(found, BadRow)
        assert len(str(found.error)) < 300


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


ODD = (
    JSON
    | st.binary(max_size=4)
    | st.datetimes()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.lists(st.tuples(st.text(max_size=2) | st.integers(), JSON), max_size=3)
    | st.lists(st.tuples(st.integers(), st.integers(), st.integers()), max_size=2)
)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6) | JSON | st.text(max_size=30))
def test_no_line_raises(line: object) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    raw = record(text.encode(errors="surrogatepass"))
    assert isinstance(parser().read(raw), (Row, BadRow))
    assert isinstance(parser(template="{{ prompt }}").read(raw), (Row, BadRow))


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), ODD, max_size=6))
def test_no_columns_raise(values: dict[str, Any]) -> None:
    raw = record(values)
    assert isinstance(parser().read(raw), (Row, BadRow))
    assert isinstance(parser(template="{{ prompt }}").read(raw), (Row, BadRow))
    assert len(raw.digest) == 8
