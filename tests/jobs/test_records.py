from __future__ import annotations

import gzip
import json
import os
import random
import sys
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import FORMATS, arrow, comma_separated, jsonl, parquet, write, zst

from quire.errors import InputFileError, InvalidRequestError
from quire.jobs import records
from quire.jobs.files import find_files
from quire.jobs.records import Record, parse_json, read_records

ROWS = [{"prompt": f'Number {i}, ä\n"quoted"', "custom_id": f"r{i}"} for i in range(10)]


def read(source: Any, **options: Any) -> list[Record]:
    return list(read_records(source if isinstance(source, list) else str(source), **options))


def fields(found: list[Record]) -> list[dict[str, Any]]:
    return [record.fields() for record in found]


def bad(record: Record) -> str:
    assert isinstance(record.raw, InvalidRequestError), record
    return str(record.raw)


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_gives_the_same_fields(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, name, ROWS)
    found = read(file)
    assert fields(found) == ROWS
    assert [record.index for record in found] == list(range(10))
    assert {record.file for record in found} == {file}
    assert [record.name for record in found] == [f"line-{record.line}" for record in found]
    first = 2 if ".csv" in name else 1
    step = 2 if ".csv" in name else 1  # the texts have two lines
    assert [record.line for record in found] == list(range(first, first + 10 * step, step))
    assert isinstance(found[0].raw, bytes) == ("json" in name)


@pytest.mark.parametrize("name", [n for n in FORMATS if ".csv" not in n])
def test_content_tells_the_format_where_the_name_does_not(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(FORMATS[name](ROWS))
    assert fields(read(tmp_path / "data")) == ROWS


def test_text_of_no_known_name_is_csv_unless_a_line_starts_with_a_brace(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(comma_separated(ROWS))
    assert fields(read(tmp_path / "data")) == ROWS
    (tmp_path / "data").write_bytes(b"broken\n" + jsonl(ROWS))
    assert fields(read(tmp_path / "data")[1:]) == ROWS


def test_content_counts_more_than_the_name(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(gzip.compress(jsonl(ROWS)))
    assert fields(read(tmp_path / "data.jsonl")) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.ipc"])
def test_standard_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, FORMATS[name](ROWS))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        found = read("-")
    assert fields(found) == ROWS
    assert found[0].file == "-"
    assert found[0].name == f"line-{found[0].line}"


def test_folders_globs_and_several_files(tmp_path: Path) -> None:
    names = ["2.csv", "1.jsonl.gz", "3.parquet"]
    for number, name in enumerate(names):
        part = [{"prompt": f"{name} {i}"} for i in range(3)]
        make = next(FORMATS[key] for key in FORMATS if key[1:] == name[1:])
        (tmp_path / name).write_bytes(make(part))
        (tmp_path / f"notes{number}.txt").write_text("not for reading")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".hidden.jsonl").write_text("{}")
    (tmp_path / "folder.csv").mkdir()
    found = read(tmp_path)
    assert [record.index for record in found] == list(range(9))
    assert [Path(record.file).name for record in found[::3]] == sorted(names)
    assert [record.name for record in found] == [
        "1.jsonl.gz:1", "1.jsonl.gz:2", "1.jsonl.gz:3", "2.csv:2", "2.csv:3", "2.csv:4",
        "3.parquet:1", "3.parquet:2", "3.parquet:3",
    ]  # fmt: skip
    assert fields(read(tmp_path / "[23].*")) == fields(found[3:])
    some = [str(tmp_path / "3.parquet"), str(tmp_path / "1.*")]
    assert fields(read(some)) == fields(found[6:]) + fields(found[:3])


def test_names_tell_equal_file_names_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text("{}\n")
    found = read(tmp_path / "*" / "x.jsonl")
    assert [record.name for record in found] == ["a/x.jsonl:1", "b/x.jsonl:1"]


def test_a_file_with_brackets_in_its_name_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "x[1].jsonl").write_text("{}")
    assert find_files(str(tmp_path / "x[1].jsonl")) == [str(tmp_path / "x[1].jsonl")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.jsonl", "no such file"),
        ("*.nothing", "no such file"),
        (".", "has no JSONL"),
        ([], "no input"),
        ("\0", "no such file"),
    ],
)
def test_what_is_not_there_is_an_error_at_once(
    source: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputFileError, match=message):
        read_records(source)


def test_blank_lines_have_no_index_but_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n  \r\n{"prompt": "a"}\n\t\n{"prompt": "b"}')
    found = read(tmp_path / "a.jsonl")
    assert [(record.index, record.line) for record in found] == [(0, 3), (1, 5)]
    (tmp_path / "a.csv").write_bytes(b'\n\nprompt,x\n\na,1\n   \nb,2\n""\n')
    found = read(tmp_path / "a.csv")
    assert [(record.index, record.line) for record in found] == [(0, 5), (1, 7), (2, 8)]
    assert "1 fields; the header has 2" in bad(found[2])


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_marks_and_line_ends_do_not_matter(name: str, end: bytes, tmp_path: Path) -> None:
    rows = [{"prompt": f"ä{i}", "x": "1"} for i in range(3)]
    plain = FORMATS[name](rows).replace(b"\r\n", b"\n")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + plain.replace(b"\n", end).rstrip())
    (tmp_path / f"other-{name}").write_bytes(plain)
    found = read(tmp_path / name)
    assert fields(found) == rows
    other = read(tmp_path / f"other-{name}")
    assert [r.digest for r in found] == [r.digest for r in other]


@pytest.mark.parametrize("name", list(FORMATS))
def test_long_texts(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 1_000_000}, {"prompt": "next"}]
    assert fields(read(write(tmp_path, name, rows))) == rows


def test_endless_lines_are_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 20)
    long = b'{"prompt": "' + b"x" * 50 + b'"}'
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + long + b'\n{"b": 2}\n' + long)
    found = read(tmp_path / "a.jsonl")
    assert [record.line for record in found] == [1, 2, 3, 4]
    assert "longer than 20 bytes" in bad(found[1])
    assert found[2].fields() == {"b": 2}
    assert "longer" in bad(found[3])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a"])
def test_empty_files_have_no_records(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    assert read(tmp_path / name) == []
    (tmp_path / name).write_bytes(b"\n\n")
    assert read(tmp_path / name) == []


@pytest.mark.parametrize("make", [parquet, arrow])
def test_tables_without_rows(make: Any, tmp_path: Path) -> None:
    table = pa.table({"prompt": pa.array([], pa.string())})
    with pa.OSFile(str(tmp_path / "a"), "wb") as sink:
        if make is parquet:
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    assert read(tmp_path / "a") == []


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.gz"])
def test_an_empty_binary_file_is_damaged(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputFileError, match=name):
        read(tmp_path / name)


def many_rows(count: int = 20_000) -> list[dict[str, str]]:
    return [{"prompt": f"{i} {i * 7919 % 10007:x} {'x' * (i % 90)}"} for i in range(count)]


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.csv.zst", "a.arrow", "a.ipc", "a.arrow.gz"]
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_file_cut_off_gives_what_it_has(name: str, share: float, tmp_path: Path) -> None:
    rows = many_rows()
    data = FORMATS[name](rows)
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    (tmp_path / "z.jsonl").write_bytes(jsonl(ROWS))
    *found, last = read(tmp_path / name)
    assert 0 < len(found) <= len(rows)
    assert fields(found) == rows[: len(found)]
    assert len(found) > len(rows) * share * 0.6
    assert name in bad(last)
    assert (last.index, last.line) == (len(found), found[-1].line + 1)
    both = read(tmp_path)
    assert len(both) == len(found) + 1 + len(ROWS)
    assert name in bad(both[len(found)])
    assert fields(both[len(found) + 1 :]) == ROWS
    assert [record.index for record in both] == list(range(len(both)))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.arrow"])
def test_nothing_to_be_read_of_one_file_is_an_error(name: str, tmp_path: Path) -> None:
    data = FORMATS[name](ROWS)
    (tmp_path / name).write_bytes(data[: len(data) // 2] if "parquet" in name else data[:12])
    with pytest.raises(InputFileError, match=name):
        read(tmp_path / name)
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS))
    first, *others = read(tmp_path)
    assert name in bad(first)
    assert fields(others) == ROWS


def test_damage_within_parquet_costs_what_follows(tmp_path: Path) -> None:
    rows = many_rows()
    file = tmp_path / "a.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, file, row_group_size=1000, write_page_checksum=True, use_dictionary=False)
    column = pq.ParquetFile(file).metadata.row_group(2).column(0)
    data = bytearray(file.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 8] = b"\xaa" * 8
    file.write_bytes(data)
    *found, last = read(file)
    assert len(found) >= 1000
    assert fields(found) == rows[: len(found)]
    assert "a.parquet" in bad(last)


def test_several_gzip_members_with_padding(tmp_path: Path) -> None:
    parts = [gzip.compress(jsonl([row])) for row in ROWS]
    (tmp_path / "a.jsonl.gz").write_bytes((b"\0" * 7).join(parts) + b"\0" * 600_000)
    assert fields(read(tmp_path / "a.jsonl.gz")) == ROWS
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(parts) + b"garbage")
    *found, last = read(tmp_path / "a.jsonl.gz")
    assert fields(found) == ROWS
    assert "damaged" in bad(last)


def test_several_zstd_frames(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zst(jsonl([row])) for row in ROWS))
    assert fields(read(tmp_path / "a.jsonl.zst")) == ROWS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04....", "zip archive or a workbook"),
        ("prompt\nx\n".encode("utf-16"), "UTF-16"),
        (b"BZh91AY", "bzip2"),
        (gzip.compress(parquet(ROWS)), "Parquet inside gzip"),
    ],
)
def test_foreign_files_are_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(InputFileError, match=message):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.arrow"])
def test_columns_are_asked_for(name: str, tmp_path: Path) -> None:
    wanted = frozenset({"prompt", "messages"})
    file = write(tmp_path, name, [{"question": "x", "messages": "y"}])
    assert len(read(file, columns=wanted)) == 1
    file = write(tmp_path, name, [{"question": "x", "place": "y"}])
    with pytest.raises(InputFileError, match=r"no column prompt.*'question', 'place'"):
        read(file, columns=wanted)
    assert len(read(file)) == 1


def test_equal_column_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,x\n1,2,3\n")
    with pytest.raises(InputFileError, match="2 columns called 'x'"):
        read(tmp_path / "a.csv")
    table = pa.Table.from_arrays([pa.array([1])] * 2, names=["x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputFileError, match="2 columns called 'x'"):
        read(tmp_path / "a.parquet")


def test_values_of_all_types(tmp_path: Path) -> None:
    when = datetime(2024, 2, 29, 12, 30, 1, 5)
    types = {
        "ns": (pa.timestamp("ns"), 1_709_209_801_000_005_123, when),
        "zone": (pa.timestamp("ms", "UTC"), 0, datetime(1970, 1, 1, tzinfo=UTC)),
        "span": (pa.duration("ns"), 1_500_001, timedelta(milliseconds=1, microseconds=500)),
        "clock": (pa.time64("ns"), 1_000, datetime(1, 1, 1, 0, 0, 0, 1).time()),
        "list": (pa.list_(pa.timestamp("ns")), [1_709_209_801_000_005_123], [when]),
        "deep": (pa.struct([("at", pa.timestamp("ns"))]), {"at": 1000}, None),
        "money": (pa.decimal128(9, 2), Decimal("1.50"), Decimal("1.50")),
        "bytes": (pa.binary(), b"\xff\0", b"\xff\0"),
        "nan": (pa.float64(), float("nan"), None),
        "half": (pa.float32(), 0.5, 0.5),
        "null": (pa.null(), None, None),
        "map": (pa.map_(pa.string(), pa.int64()), [("a", 1)], [("a", 1)]),
        "word": (pa.dictionary(pa.int8(), pa.string()), "w", "w"),
    }
    arrays = [pa.array([value, None], kind) for kind, value, _ in types.values()]
    table = pa.table(dict(zip(types, arrays, strict=True)))
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        one, nothing = read(tmp_path / name)
        found = one.fields()
        for key, (_, _, expected) in types.items():
            if key not in ("nan", "deep"):
                assert found[key] == expected, key
        assert found["nan"] != found["nan"]
        assert found["deep"]["at"] == datetime(1970, 1, 1, 0, 0, 0, 1)
        assert set(nothing.fields().values()) == {None}
        assert len(one.digest) == len(nothing.digest) == 8
        assert one.digest != nothing.digest


def test_one_value_that_python_has_not_costs_one_row(tmp_path: Path) -> None:
    times = pa.array([0, 400_000 * 366 * 86400, 1], pa.timestamp("s"))
    texts = pa.array([b"fine", b"also", b"\xff\xfe"]).view(pa.string())
    table = pa.table({"prompt": texts, "when": times})
    pq.write_table(table, tmp_path / "a.parquet")
    good, late, binary = read(tmp_path / "a.parquet")
    assert good.fields()["prompt"] == "fine"
    assert "'when' cannot be read" in bad(late)
    assert "'prompt' cannot be read" in bad(binary)


def test_digests_follow_the_content() -> None:
    def digest(raw: Any) -> bytes:
        return Record(0, "a", 1, "line-1", raw).digest

    assert digest(b'{"a": 1}') != digest(b'{"a": 2}')
    assert digest({"a": 1, "b": None}) == digest({"b": None, "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
    assert digest({"a": b"x"}) != digest({"a": "x"})
    assert len(digest({"a": "\udc80"})) == len(digest(InvalidRequestError("\udc80"))) == 8
    record = Record(0, "a", 1, "line-1", b"{}")
    assert replace(record, index=5, file="b", line=2, name="x").digest == record.digest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv.zst", "a.parquet", "a.arrow"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    """60 MB, in Parquet as one row group, take a few MB of Python's and Arrow's memory."""
    rng = random.Random(0)
    rows = [{"prompt": rng.randbytes(1000).hex()} for _ in range(30_000)]
    if name == "a.parquet":
        (tmp_path / name).write_bytes(parquet(rows, rows_a_group=30_000))
    elif name == "a.arrow":
        (tmp_path / name).write_bytes(arrow(rows, rows_a_batch=1000))
    else:
        write(tmp_path, name, rows)
    del rows
    before = pa.total_allocated_bytes()
    most = count = 0
    tracemalloc.start()
    for record in read_records(str(tmp_path / name)):
        count += len(record.fields())
        if count % 500 == 0:
            most = max(most, pa.total_allocated_bytes() - before)
    used = tracemalloc.get_traced_memory()[1] + most
    tracemalloc.stop()
    assert count == 30_000
    assert used < 30e6


@pytest.mark.parametrize("depth", [64, 65, 900, 100_000])
@pytest.mark.parametrize("ends", ["[]", ('{"a":', "}")])
def test_nesting_has_a_limit(depth: int, ends: Any) -> None:
    text = ends[0] * depth + ("" if ends == "[]" else "1") + ends[1] * depth
    if depth == 64:
        parse_json(text)
        return
    with pytest.raises(InvalidRequestError, match="nested deeper than 64"):
        parse_json(text)


def test_many_brackets_are_no_nesting() -> None:
    assert len(parse_json(json.dumps([[1]] * 100))) == 100
    assert parse_json(json.dumps("[" * 100)) == "[" * 100


def test_missing_pyarrow_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write(tmp_path, name, ROWS) for name in ("a.parquet", "a.arrow", "a.jsonl.zst")]
    plain = write(tmp_path, "a.csv", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(read(plain)) == 10
    for file in files:
        with pytest.raises(InputFileError, match=r"quire\[arrow\]"):
            read_records(file)
    (tmp_path / "data").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(InputFileError, match=r"quire\[arrow\]"):
        read(tmp_path / "data")
