"""Input files: lines of JSONL, or rows of CSV with a template; ``-`` is standard input."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from quire.errors import InputFileError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class Record:
    """A row of the input before it is parsed. ``index`` counts rows from 0, ``line`` lines from 1.

    ``name`` is the row's id where it has none of its own. ``raw``: a line of JSON, the columns of a
    table, or why there is neither.
    """

    index: int
    file: str
    line: int
    name: str
    raw: bytes | dict[str, Any] | InvalidRequestError

    @property
    def digest(self) -> bytes:
        """8 bytes that change when the row does."""
        if isinstance(self.raw, bytes):
            data = self.raw
        elif isinstance(self.raw, dict):
            data = json.dumps(self.raw).encode()
        else:
            data = str(self.raw).encode()
        return hashlib.blake2b(data, digest_size=8).digest()


def read_records(source: str, template: Path | None = None) -> Iterator[Record]:
    """The rows of ``source``, one at a time; blank lines are skipped.

    With ``template`` (or a name that ends in .csv) the input is CSV with a header line. Raises
    InputFileError.
    """
    with ExitStack() as stack:
        stream = _open(source, stack)
        if template is not None or source.endswith(".csv"):
            yield from _csv_records(source, stream, template)
        else:
            yield from _json_records(source, stream)


def read_template(path: Path) -> str:
    """The text of a template. Raises InputFileError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(
            f"The template {path} cannot be used: {error}.", value=str(path)
        ) from error


def _open(source: str, stack: ExitStack) -> IO[bytes]:
    if source == "-":
        return sys.stdin.buffer
    try:
        return stack.enter_context(open(source, "rb"))
    except OSError as error:
        raise InputFileError(
            f"{source} cannot be read: {error.strerror}.",
            value=source,
            action="Give a JSONL or CSV file, or - for standard input.",
        ) from error


def _json_records(source: str, stream: IO[bytes]) -> Iterator[Record]:
    index = 0
    for number, raw in enumerate(stream, start=1):
        if number == 1 and raw.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")):
            raise InputFileError(
                f"{source} is a compressed or binary file.",
                value=source,
                action="Give plain JSONL.",
            )
        text = raw.strip()
        if text:
            yield Record(index, source, number, f"line-{number}", text)
            index += 1


def _csv_records(source: str, stream: IO[bytes], template: Path | None) -> Iterator[Record]:
    if template is None:
        raise InputFileError(
            f"{source} is CSV and needs a template.",
            value=source,
            action="Give --template FILE with a jinja2 template over the columns.",
        )
    reader = csv.DictReader(raw.decode("utf-8-sig", errors="replace") for raw in stream)
    index = 0
    while True:
        raw: dict[str, Any] | InvalidRequestError
        line = reader.line_num + 1
        try:
            columns = next(reader, None)
            if columns is None:
                return
            line = reader.line_num
            raw = dict(columns)
            if None in columns or None in columns.values():
                raw = InvalidRequestError(
                    f"The row has another number of fields than the header's "
                    f"{len(reader.fieldnames or [])}.",
                    field="template",
                    value=len(columns),
                )
        except csv.Error as error:
            raw = InvalidRequestError(f"{error}.", field="template")
        yield Record(index, source, line, f"line-{line}", raw)
        index += 1
