from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import comma_separated, jsonl, parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InputFileError, InvalidRequestError
from quire.jobs import parquet as module
from quire.jobs.parquet import input_schema, write_parquet
from quire.jobs.records import Record, read_records

RESULTS = [
    "custom_id", "text", "finish_reason", "samples", "prompt_tokens", "completion_tokens", "error",
]  # fmt: skip


def line(record: Record, texts: Sequence[str] = ("fine",), chat: bool = False) -> str:
    choices = [
        {"finish_reason": "stop", **({"message": {"content": t}} if chat else {"text": t})}
        for t in texts
    ]
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    body = {"choices": choices, "usage": usage}
    return json.dumps({"custom_id": record.name, "response": {"body": body}, "error": None})


def failed(message: str = "no good") -> str:
    return json.dumps({"custom_id": None, "response": None, "error": {"message": message}})


def records(rows: Sequence[Any]) -> list[Record]:
    return [Record(i, "a", i + 1, f"line-{i + 1}", row) for i, row in enumerate(rows)]


def write(path: Path, rows: Sequence[Any], **options: Any) -> pa.Table:
    write_parquet(path, ((r, line(r)) for r in records(rows)), **options)
    return pq.read_table(path)


def raw(rows: Sequence[Any]) -> list[bytes]:
    return jsonl(rows).splitlines()


def test_results_stand_beside_the_input(tmp_path: Path) -> None:
    one, many, bad, unread = records(
        [*raw([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "c"}]), b"{"]
    )
    pairs = [
        (one, line(one)),
        (many, line(many, ["x", "y"], chat=True)),
        (bad, failed()),
        (unread, failed("not JSON")),
    ]
    write_parquet(tmp_path / "out.parquet", pairs)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["prompt", "n", *RESULTS]
    rows = table.to_pylist()
    assert [row["prompt"] for row in rows] == ["a", "b", "c", None]
    assert [row["text"] for row in rows] == ["fine", "x", None, None]
    assert rows[0]["samples"] is None
    assert [sample["text"] for sample in rows[1]["samples"]] == ["x", "y"]
    assert [row["error"] for row in rows] == [None, None, "no good", "not JSON"]
    assert [row["custom_id"] for row in rows] == ["line-1", "line-2", None, None]
    assert [row["prompt_tokens"] for row in rows] == [3, 3, None, None]


def test_kinds_of_json_fields(tmp_path: Path) -> None:
    rows = [
        {"int": 1, "float": 1, "text": "x", "bool": True, "mixed": 1, "list": [1, None]},
        {"int": 2, "float": 2.5, "text": None, "bool": False, "mixed": "a", "list": {"ä": 1}},
        {"int": None, "big": 2**60, "huge": 2**70, "mixed": None, "none": None},
    ]  # fmt: skip
    table = write(tmp_path / "out.parquet", raw(rows))
    found = {name: str(table.schema.field(name).type) for name in table.column_names[:9]}
    assert found == {
        "int": "int64", "float": "double", "input_text": "string", "bool": "bool",
        "mixed": "string", "list": "string", "big": "int64", "huge": "string", "none": "string",
    }  # fmt: skip
    assert table["float"].to_pylist() == [1.0, 2.5, None]
    assert table["mixed"].to_pylist() == ["1", '"a"', None]
    assert table["list"].to_pylist() == ["[1, null]", '{"ä": 1}', None]
    assert table["big"].to_pylist() == [None, None, 2**60]
    assert table["huge"].to_pylist() == [None, None, str(2**70)]


VALUE = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.lists(st.integers(), max_size=2)
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from("abc"), VALUE), max_size=8),
    size=st.integers(1, 9),
)
def test_the_schema_does_not_depend_on_where_row_groups_end(
    rows: list[dict[str, Any]], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("x")
    whole = write(folder / "whole.parquet", raw(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", size)
        parts = write(folder / "parts.parquet", raw(rows))
    assert parts.schema == whole.schema
    assert sorted(os.listdir(folder)) == ["parts.parquet", "whole.parquet"]
    for name in whole.column_names:
        one, other = whole[name].to_pylist(), parts[name].to_pylist()
        if str(whole.schema.field(name).type) == "string" and name in "abc":
            one, other = ([None if v is None else _value(v) for v in c] for c in (one, other))
        assert one == other, name


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_types_of_parquet_input_are_kept(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": pa.array(["a", "b", None], pa.large_string()),
            "when": pa.array([datetime(2024, 1, 1), None, None], pa.timestamp("ns")),
            "small": pa.array([1, 2, None], pa.int8()),
            "cost": pa.array([Decimal("1.50")] * 3, pa.decimal128(7, 2)),
            "messages": pa.array(
                [[{"role": "user", "content": "x"}], [], None],
                pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
            ),
            "word": pa.array(["x", "y", "x"]).dictionary_encode(),
            "bytes": [b"\xff", b"", None],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    source = str(tmp_path / "in.parquet")
    pairs = ((r, line(r)) for r in read_records(source))
    write_parquet(tmp_path / "out.parquet", pairs, input_schema(source))
    found = pq.read_table(tmp_path / "out.parquet")
    expected = {f.name: f.type for f in table.schema}
    expected |= {"when": pa.timestamp("us"), "word": pa.string()}
    assert {name: found.schema.field(name).type for name in expected} == expected
    inputs = table.cast(pa.schema(list(expected.items())))
    assert found.select(table.column_names).to_pylist() == inputs.to_pylist()


def test_types_that_parquet_has_not_become_json(tmp_path: Path) -> None:
    column = pa.array([(1, 2, 3), None], pa.month_day_nano_interval())
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([("x", column.type)])) as writer:
        writer.write_batch(pa.record_batch([column], ["x"]))
    source = str(tmp_path / "a.arrow")
    pairs = [(r, line(r)) for r in read_records(source)]
    write_parquet(tmp_path / "out.parquet", pairs, input_schema(source))
    assert pq.read_table(tmp_path / "out.parquet")["x"].to_pylist() == ["[1, 2, 3]", None]


def test_a_schema_is_known_where_all_files_agree(tmp_path: Path) -> None:
    def place(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    one = place("1.parquet", parquet([{"a": 1}]))
    two = place("2.parquet", parquet([{"a": 2, "b": "x"}]))
    other = place("3.parquet", parquet([{"a": "text"}]))
    text = place("4.csv", comma_separated([{"a": 1}]))
    broken = place("5.parquet", b"PAR1....")
    assert input_schema(one) == pa.schema([("a", pa.int64())])
    assert input_schema([one, two, broken]) == pa.schema([("a", pa.int64()), ("b", pa.string())])
    assert input_schema([one, other]) is None
    assert input_schema([one, text]) is None
    assert input_schema("-") is None
    mixed = [one, other, text]
    pairs = [(r, line(r)) for r in read_records(mixed)]
    write_parquet(tmp_path / "out.parquet", pairs, input_schema(mixed))
    assert pq.read_table(tmp_path / "out.parquet")["a"].to_pylist() == ["1", '"text"', '"1"']


def test_result_names_win_and_nothing_is_lost(tmp_path: Path) -> None:
    row = {"text": "mine", "input_text": "also", "error": 5, "custom_id": "c", "id": "i"}
    table = write(tmp_path / "out.parquet", raw([row]))
    assert table.column_names == ["input_input_text", "input_text", "input_error", "id", *RESULTS]
    assert table["input_input_text"].to_pylist() == ["mine"]
    assert table["input_text"].to_pylist() == ["also"]
    assert table["input_error"].to_pylist() == [5]
    assert table["text"].to_pylist() == ["fine"]
    assert table["custom_id"].to_pylist() == ["line-1"]


def test_half_surrogates_and_unread_records(tmp_path: Path) -> None:
    found = records([b'{"prompt": "a\\ud800b", "\\udfff": 1}', InvalidRequestError("damaged")])
    pairs = [(found[0], failed("\ud800")), (found[1], failed())]
    write_parquet(tmp_path / "out.parquet", pairs)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert rows[0]["prompt"] == "a\ufffdb"
    assert rows[0]["\ufffd"] == 1
    assert rows[0]["error"] == "\ufffd"
    assert rows[1]["prompt"] is None


def test_no_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "out.parquet", [], pa.schema([("prompt", pa.string())]))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["prompt", *RESULTS]
    assert len(table) == 0


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from ((r, line(r)) for r in records(raw([{"a": 1}])))
        raise KeyboardInterrupt

    (tmp_path / "out.parquet").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_parquet(tmp_path / "out.parquet", broken())
    assert os.listdir(tmp_path) == ["out.parquet"]
    assert (tmp_path / "out.parquet").read_text() == "before"


def test_too_many_different_fields(tmp_path: Path) -> None:
    rows = [{f"field {i}": i} for i in range(1001)]
    with pytest.raises(InputFileError, match="more than 1000 different fields"):
        write(tmp_path / "out.parquet", raw(rows))


def test_rows_are_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 4)
    table = write(tmp_path / "out.parquet", raw([{"a": i} for i in range(10)]))
    assert table["a"].to_pylist() == list(range(10))
    assert pq.ParquetFile(tmp_path / "out.parquet").metadata.num_row_groups == 3
