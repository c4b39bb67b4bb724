from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InputFileError, InvalidRequestError
from quire.jobs import csv_file
from quire.jobs.csv_file import open_csv

Rows = list[tuple[int, dict[str, str] | InvalidRequestError]]


def read(text: str | bytes) -> Rows:
    data = text if isinstance(text, bytes) else text.encode()
    return list(open_csv(io.BufferedReader(io.BytesIO(data)), "a.csv")[1])


def good(rows: Rows) -> list[dict[str, str]]:
    return [row for _, row in rows if isinstance(row, dict)]


CELL = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    names=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4, unique=True),
    data=st.data(),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_the_standard_writer_writes_comes_back(
    names: list[str], data: st.DataObject, end: str
) -> None:
    cells = st.lists(CELL, min_size=len(names), max_size=len(names))
    rows = data.draw(st.lists(cells, max_size=6))
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    assert good(read(text.getvalue())) == [dict(zip(names, row, strict=True)) for row in rows]


def test_lines_are_those_of_the_file() -> None:
    rows = read('a,b\n1,"x\ny\n"\n\n2,z\n')
    assert [line for line, _ in rows] == [2, 6]


@pytest.mark.parametrize(
    "broken",
    ['"open,1', 'a,"b" c', '"a"b,1', '"open', "one", "one,two,three", '"a,1"', '"x""'],
)
@pytest.mark.parametrize(
    "after",
    [
        ["1,2"] * 4,
        ['"a","b"'] * 4,
        ['1,"two ""words"""', '"x, y",2'],
        ['"","b"', '"",""', "1,2"],
    ],
)
def test_a_broken_row_costs_no_other(broken: str, after: list[str]) -> None:
    rows = read("\n".join(["a,b", "0,0", broken, *after]))
    clean = read("\n".join(["a,b", "0,0", *after]))
    assert [row for _, row in rows if isinstance(row, dict)] == good(clean)
    assert [line for line, row in rows if not isinstance(row, dict)] == [3]
    assert [line for line, _ in rows] == list(range(2, len(after) + 4))


def test_an_open_quote_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_file, "LONGEST_FIELD", 100)
    rows = read('a\n"open\n' + "x\n" * 500)
    assert len(good(rows)) == 500
    assert isinstance(rows[0][1], InvalidRequestError)


def test_bytes_that_are_not_utf_8_cost_their_row() -> None:
    rows = read("prompt,x\nä,1\n".encode() + "ö,2\n".encode("latin-1") + "ü,3\n".encode())
    assert good(rows) == [{"prompt": "ä", "x": "1"}, {"prompt": "ü", "x": "3"}]
    assert "not UTF-8" in str(rows[1][1])
    with pytest.raises(InputFileError, match="header line of a"):
        read("größe\n1\n".encode("latin-1"))


def test_long_fields_and_null_characters() -> None:
    assert good(read("a,b\n" + "x" * 300_000 + ",\0\n")) == [{"a": "x" * 300_000, "b": "\0"}]


def test_a_broken_header_is_an_error() -> None:
    with pytest.raises(InputFileError, match="header line"):
        read('"a\n1\n')


class Damaged(io.RawIOBase):
    """Bytes, and then an error."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self.data.readinto(buffer)
        if not count:
            raise OSError("the end is missing")
        return count


def test_rows_after_an_open_quote_survive_a_damage_too() -> None:
    stream = io.BufferedReader(Damaged(b'a\n1\n"open\n2\n3\n4 is not whole'))
    rows = open_csv(stream, "a.csv")[1]
    found: Rows = []
    with pytest.raises(OSError, match="the end is missing"):
        found.extend(rows)
    assert good(found) == [{"a": "1"}, {"a": "2"}, {"a": "3"}]
