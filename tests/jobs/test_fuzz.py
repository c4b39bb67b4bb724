"""A hundred thousand damaged lines, and what passes of them through the steps that follow."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from files import FORMATS

from quire import LLM
from quire.api.outputs import RequestOutput
from quire.api.setup import Setup
from quire.decode.params import SamplingParams
from quire.errors import InputFileError, RequestError
from quire.jobs.records import read_records
from quire.jobs.results import result_line, to_json
from quire.jobs.rows import BadRow, Row, RowParser

VARIANTS = 100_000

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Héllo"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "user", "content": "And now?"},
]
SAMPLING = {
    "n": 2,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"7": -100, "8": 5},
    "seed": 11,
    "logprobs": 2,
    "prompt_logprobs": 1,
    "stop": ["\n", "end"],
    "stop_token_ids": [3],
    "min_tokens": 1,
    "max_tokens": 4,
    "ignore_eos": True,
    "bad_words": ["bad", "word"],
}
VALID: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", **SAMPLING},
    {"custom_id": "a", "prompt": "x", "model": "demo", "user": "me", "metadata": {"k": "v"}},
    {"id": 7, "prompt_token_ids": [5, 6, 7], "max_tokens": 3},
    {"messages": CHAT, "tools": [{"type": "function"}], "documents": [], "seed": 1},
    {"messages": CHAT, "chat_template_kwargs": {"add_generation_prompt": False, "bos_token": "x"}},
    {
        "custom_id": "b",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": CHAT, "logprobs": True, "top_logprobs": 3, "n": 2, "stop": None},
    },
    {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": ["only one"], "max_completion_tokens": 5, "logit_bias": {"1": 1}},
    },
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
VALID += [
    {"prompt": "x", "regex": "[a-z]+", "max_tokens": 2},
    {"prompt": "x", "choice": ["yes", "no"], "max_tokens": 2},
    {"prompt": "x", "grammar": 'start: "a" | "b"', "max_tokens": 2},
    {"prompt": "x", "json_schema": SCHEMA, "max_tokens": 2},
    {"prompt": "x", "structured_outputs": {"json": json.dumps(SCHEMA)}, "max_tokens": 2},
    {
        "messages": CHAT,
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    },
]
ODD: list[Callable[[random.Random], Any]] = [
    lambda _: None,
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice([0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400]),
    lambda rng: rng.choice([0.0, -0.5, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]),
    lambda rng: rng.choice(["", "x", "\ud800", "a\udfffb", "\0", "null", "{", "\u2028", "😀" * 9]),
    lambda rng: rng.choice([[], [None], [""], [[]], ["a", 1], [1.5], [True], [2**70], [-1]]),
    lambda rng: rng.choice([{}, {"": ""}, {"a": None}, {"1": "x"}, {"\ud800": 1}, {"9" * 5000: 1}]),
    lambda rng: nested(rng.choice([2, 30, 70, 500]), rng.choice(["list", "dict"])),
    lambda rng: copy(rng.choice(list(SAMPLING.values()))),
    lambda rng: copy(rng.choice(VALID)),
    lambda _: copy(CHAT),
    lambda _: [{"role": "user", "content": "x", "name": 5, "extra": [1]}],
    lambda _: {"messages": [], "self": 1, "template": 2, "tools": 3, "loop": 4},
]


def copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"k": value}
    return value


def places(value: Any, depth: int = 20) -> Iterator[tuple[Any, Any]]:
    """All (container, key) pairs of a nested value, but for those deeper than ``depth``."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if depth and isinstance(value[key], (dict, list)):
            yield from places(value[key], depth - 1)


def swapped(rng: random.Random, line: dict[str, Any]) -> bytes:
    """Some values changed for others, or moved to other names."""
    line = copy(line)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(places(line)) or [({"x": 1}, "x")])
        kind = rng.random()
        if kind < 0.7:
            container[key] = rng.choice(ODD)(rng)
        elif kind < 0.85:
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice([*SAMPLING, "prompt", "messages", "url", "model", "x"])] = (
                container.pop(key)
            )
    return dump(line)


def dump(line: Any) -> bytes:
    """As JSON, with half surrogates as bytes where the text is not escaped."""
    try:
        return json.dumps(line).encode()
    except RecursionError:
        return b"[" * 1000


def broken(rng: random.Random, line: dict[str, Any]) -> bytes:
    """Bytes flipped, cut, doubled, removed or put in."""
    data = bytearray(json.dumps(line, ensure_ascii=rng.random() < 0.5).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 30)]
        elif kind == 3:
            del data[at : at + rng.randint(1, 20)]
        elif kind == 4:
            data[at:at] = rng.choice(
                [
                    b"\0",
                    b"\xff",
                    b'"',
                    b"{",
                    b"]",
                    b",",
                    b"\\",
                    b"\\ud83d",
                    b"NaN",
                    b"1e999",
                    b"\xa0",
                ]
            )
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 5))
    return bytes(data)


def grown(rng: random.Random, line: dict[str, Any]) -> bytes:
    """Names given twice, deep nesting, endless numbers and texts."""
    data = json.dumps(line).encode()
    name = json.dumps(rng.choice(list(SAMPLING) + list(line))).encode()
    value = rng.choice(
        [
            b"9" * rng.choice([30, 400, 5000]),
            b"1e" + b"9" * 9,
            b"-" + b"0" * 50,
            b"[" * rng.choice([60, 70, 5000]) + b"]" * 70,
            b'{"a":' * 65 + b"1" + b"}" * 65,
            b'"' + b"long " * 2000 + b'"',
            b'"\\ud83d"',
            b"Infinity",
            dump(rng.choice(ODD)(rng)),
        ]
    )
    return data[:-1] + b", " + name + b": " + value + b"}"


def variant(rng: random.Random) -> bytes:
    make = rng.choices([swapped, broken, grown], [5, 4, 2])[0]
    return make(rng, rng.choice(VALID)).replace(b"\n", b" ")


def good(number: int) -> dict[str, Any]:
    return {"custom_id": f"good-{number}", **VALID[0]}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row | BadRow]:
    """The rows of a file of damaged lines with a good one after every tenth."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    file = tmp_path_factory.mktemp("fuzz") / "in.jsonl"
    with open(file, "wb") as stream:
        for number in range(VARIANTS):
            stream.write(variant(rng) + b"\n")
            if number % 10 == 0:
                stream.write(json.dumps(good(number)).encode() + b"\n")
    parser = RowParser(SamplingParams(max_tokens=4), frozenset({"demo"}), lambda _: None)
    return [parser.read(record) for record in read_records(str(file))]


@pytest.mark.slow
def test_good_rows_are_never_lost(rows: list[Row | BadRow]) -> None:
    wanted = [f"good-{number}" for number in range(0, VARIANTS, 10)]
    found = [row for row in rows if row.custom_id is not None and row.custom_id[:5] == "good-"]
    assert [row.custom_id for row in found] == wanted
    for row in found:
        assert isinstance(row, Row)
        assert row.params.logit_bias == {7: -100, 8: 5}
    assert [row.index for row in rows] == list(range(len(rows)))


@pytest.mark.slow
def test_damaged_files_give_records_or_say_why(tmp_path: Path) -> None:
    """Bytes changed, put in and cut out of files of every format; nothing but InputFileError."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    lines = [{"prompt": f"{i} {'x' * i}", "m": CHAT[3:], "n": i % 3} for i in range(40)]
    whole = {name: make(lines) for name, make in FORMATS.items()}
    good = 0
    for _ in range(4000):
        name = rng.choice(list(whole))
        data = bytearray(whole[name])
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(data))
            change = rng.randrange(4)
            if change == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif change == 1:
                data[at] = rng.choice([0, 127, 128, 255])
            elif change == 2:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
            else:
                del data[at + 1 : at + rng.choice([3, 9, len(data)])]
        (tmp_path / name).write_bytes(data)
        try:
            for record in read_records(str(tmp_path / name)):
                good += isinstance(record.raw, (bytes, dict))
                assert len(record.digest) == 8
        except InputFileError:
            pass
    assert good > 4000


@pytest.mark.slow
def test_bad_rows_make_short_lines_that_any_file_holds(rows: list[Row | BadRow]) -> None:
    count = 0
    for row in rows:
        if isinstance(row, BadRow):
            count += 1
            assert len(str(row.error)) < 1000, row
            line = to_json(result_line(row, None, "demo", str, 0))
            assert json.loads(line.encode())["custom_id"] == row.custom_id
    assert count > VARIANTS // 5  # or the lines were not damaged


@pytest.mark.slow
def test_what_passes_can_be_tokenized_or_is_a_request_error(rows: list[Row | BadRow]) -> None:
    setup = Setup.make("demo", kv_memory="8MiB")
    encoded = refused = 0
    for row in rows:
        if isinstance(row, Row) and not row.custom_id.startswith("good-"):
            try:
                text, ids = setup.encode(row.prompt)
            except RequestError:
                refused += 1
                continue
            encoded += 1
            assert ids
            assert all(0 <= i < setup.spec.vocab_size for i in ids)
            output = RequestOutput(0, text, ids)
            to_json(result_line(row, output, "demo", str, 0)).encode()
    assert encoded
    assert refused


@pytest.mark.slow
def test_what_passes_can_be_sampled(rows: list[Row | BadRow], tinystories: Path) -> None:
    distinct: dict[str, Row] = {}
    for row in rows:
        if isinstance(row, Row) and "messages" not in row.prompt:
            distinct.setdefault(repr(row.params), row)
    chosen = random.sample(list(distinct.values()), min(400, len(distinct)))
    pairs = [
        (row.prompt, replace(row.params, n=min(row.params.n, 3), max_tokens=2, min_tokens=0))
        for row in chosen
    ]
    with LLM(tinystories, kv_memory="16MiB") as llm:
        outputs = llm.generate([prompt for prompt, _ in pairs], [params for _, params in pairs])
    assert len(outputs) == len(pairs)
    assert sum(output.error is None for output in outputs) > len(pairs) // 10
    for output in outputs:
        assert output.error is not None or output.outputs
