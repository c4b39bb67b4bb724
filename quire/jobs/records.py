"""Records of the input: what a row of any format is before anyone looks into it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from io import BufferedReader
from itertools import count
from typing import Any

from quire.errors import InputFileError, InvalidRequestError, shown
from quire.jobs.csv_file import open_csv
from quire.jobs.extras import require_pyarrow
from quire.jobs.files import find_files, name_prefixes
from quire.jobs.streams import kind_by_name, open_input, recognise, title

Raw = bytes | dict[str, Any] | InvalidRequestError
LONGEST_LINE = 64 << 20  # bytes
DEEPEST = 64  # nested lists and objects; some Python code recurses for each


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the input.

    ``index`` counts all records of the input from 0, over all files; ``line`` from 1 within its
    ``file`` (for Parquet and Arrow it is the number of the row). ``name`` is for people and the
    default ``custom_id``: ``line-17``, or ``part-2.jsonl:17`` when there are several files.
    ``raw`` is an undecoded line of JSONL, or named columns, or why the record cannot be read.
    """

    index: int
    file: str
    line: int
    name: str
    raw: Raw

    @property
    def digest(self) -> bytes:
        """8 bytes that tell whether the record is still the same."""
        raw = self.raw
        if isinstance(raw, dict):
            raw = json.dumps(raw, sort_keys=True, default=repr).encode()
        elif isinstance(raw, InvalidRequestError):
            raw = str(raw).encode(errors="replace")
        return blake2b(raw, digest_size=8).digest()

    def fields(self) -> dict[str, Any]:
        """The record's named values. Raises InvalidRequestError if there are none to be had."""
        if isinstance(self.raw, InvalidRequestError):
            raise self.raw
        if isinstance(self.raw, dict):
            return self.raw
        try:
            text = self.raw.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"This is not UTF-8: {error.reason} at byte {error.start + 1}."
            ) from error
        found = parse_json(text)
        if not isinstance(found, dict):
            raise InvalidRequestError("A line must hold a JSON object.", value=found)
        return found


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises InvalidRequestError."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"This is not JSON: {error.msg} at character {error.pos + 1}.", value=text[:80]
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise InvalidRequestError(f"This is not JSON: {error}.", value=text[:80]) from error
    except RecursionError:
        value = None
        deep = True
    else:
        deep = text.count("[") + text.count("{") > DEEPEST and _deeper(value, DEEPEST)
    if deep:
        raise InvalidRequestError(
            f"Lists and objects are nested deeper than {DEEPEST} levels.", limit=DEEPEST
        )
    return value


def _deeper(value: object, levels: int) -> bool:
    """Whether lists and objects are nested deeper than ``levels``."""
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, (list, dict))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (list, dict))
        ]
        if not layer:
            return False
    return True


def read_records(
    source: str | Sequence[str], columns: frozenset[str] = frozenset()
) -> Iterator[Record]:
    """The records of all files of ``source``, one at a time; blank lines are left out.

    ``source``: a file, a folder, a glob, ``-`` for standard input, or several of them; see
    `find_files`. ``columns``: names of which a file of columns must have at least one.

    A file that turns out damaged, or of an unknown kind, gives all records before the damage and
    then one that says so; the other files are read all the same. Only where the input is one file
    and nothing of it can be read, InputFileError is raised. It is raised at once where a file does
    not exist or pyarrow is needed and missing.
    """
    files = find_files(source)
    for file in files:
        kind, packing = kind_by_name(file)
        if kind in ("parquet", "arrow") or packing == "zstd":
            require_pyarrow(f"Reading {file}")
    return _records(files, columns)


def _records(files: Sequence[str], columns: frozenset[str]) -> Iterator[Record]:
    numbers = count()
    for file, prefix in zip(files, name_prefixes(files), strict=True):
        line = 0
        try:
            for line, raw in _lines(file, columns):
                yield Record(next(numbers), file, line, f"{prefix}{line}", raw)
        except (OSError, InputFileError) as error:
            problem = _problem(file, line, error)
            if line == 0 and len(files) == 1:
                raise problem from error
            line += 1
            raw = InvalidRequestError(problem.what, value=file, action=problem.action)
            yield Record(next(numbers), file, line, f"{prefix}{line}", raw)


def _problem(file: str, line: int, error: OSError | InputFileError) -> InputFileError:
    if isinstance(error, InputFileError):
        return error
    why = (error.strerror or str(error) or "unreadable").splitlines()[0].rstrip(".")
    if line == 0:
        return InputFileError(f"{title(file)} cannot be read: {why}.", value=file)
    return InputFileError(
        f"{title(file)} is damaged after line {line}: {why}.",
        value=file,
        action="Its rows up to there were read.",
    )


def _lines(file: str, columns: frozenset[str]) -> Iterator[tuple[int, Raw]]:
    """Numbered lines or rows of one file. Raises InputFileError or OSError where it is damaged."""
    with open_input(file) as raw:
        kind, stream = recognise(file, raw)
        if kind == "jsonl":
            yield from _json_lines(stream)
        elif kind == "csv":
            header, rows = open_csv(stream, title(file))
            if header:
                _check_columns(file, header, columns)
            yield from rows
        else:
            yield from _arrow_rows(kind == "parquet", file, stream, columns)


def _json_lines(stream: BufferedReader) -> Iterator[tuple[int, Raw]]:
    for number, line in enumerate(iter(partial(stream.readline, LONGEST_LINE), b""), start=1):
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST_LINE)
            yield number, InvalidRequestError(f"The line is longer than {LONGEST_LINE} bytes.")
            continue
        text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
        if text:
            yield number, text


def _arrow_rows(
    parquet: bool, file: str, stream: BufferedReader, columns: frozenset[str]
) -> Iterator[tuple[int, Raw]]:
    require_pyarrow(f"Reading {title(file)}")
    from quire.jobs import arrow

    if parquet and file == "-":
        raise InputFileError("Parquet cannot come from standard input.", action="Give a file.")
    schema, batches = arrow.open_parquet(file) if parquet else arrow.open_arrow(stream)
    _check_columns(file, schema.names, columns)
    yield from enumerate(arrow.read_rows(batches), start=1)


def _check_columns(file: str, names: Sequence[str], columns: frozenset[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise InputFileError(f"{title(file)} has {times} columns called {shown(name)}.", value=name)
    if columns and columns.isdisjoint(names):
        known = ", ".join(map(shown, names[:20]))
        raise InputFileError(
            f"{title(file)} has no column prompt; its columns are {known}.",
            value=file,
            action="Rename one, or give --template with a text over the columns.",
        )
