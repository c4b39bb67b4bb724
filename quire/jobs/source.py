"""Input files: lines of JSONL, or rows of CSV with a template; ``-`` is standard input."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.errors import InputFileError, InvalidRequestError
from quire.jobs.rows import BadRow, Row, RowParser


def read_rows(
    source: str, parser: RowParser, template: Path | None = None
) -> Iterator[Row | BadRow]:
    """The rows of ``source``, one at a time; blank lines are skipped.

    With ``template`` (or a name that ends in .csv) the input is CSV with a header line, and the
    template, in jinja2 over the columns, makes each row's prompt. Raises InputFileError.
    """
    with ExitStack() as stack:
        stream = _open(source, stack)
        if template is not None or source.endswith(".csv"):
            yield from _csv_rows(source, stream, parser, template)
        else:
            yield from _json_rows(source, stream, parser)


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


def _json_rows(source: str, stream: IO[bytes], parser: RowParser) -> Iterator[Row | BadRow]:
    for number, raw in enumerate(stream, start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            if number == 1 and raw.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")):
                raise InputFileError(
                    f"{source} is a compressed or binary file.",
                    value=source,
                    action="Give plain JSONL.",
                ) from error
            yield BadRow(
                number, None, InvalidRequestError(f"This is not UTF-8: {error}.", value=raw[:40])
            )
            continue
        if text:
            yield parser.parse(number, text)


def _csv_rows(
    source: str, stream: IO[bytes], parser: RowParser, template: Path | None
) -> Iterator[Row | BadRow]:
    if template is None:
        raise InputFileError(
            f"{source} is CSV and needs a template.",
            value=source,
            action="Give --template FILE with a jinja2 template over the columns.",
        )
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=False
    )
    try:
        pattern = environment.from_string(template.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise InputFileError(
            f"The template {template} cannot be used: {error}.", value=str(template)
        ) from error
    lines = (raw.decode("utf-8-sig", errors="replace") for raw in stream)
    reader = csv.DictReader(lines)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader, None)
            if record is None:
                return
            line = reader.line_num
            if None in record or None in record.values():
                raise InvalidRequestError(
                    f"The row has another number of fields than the header's "
                    f"{len(reader.fieldnames or [])}.",
                    value=len(record),
                )
            prompt = pattern.render(record)
        except (csv.Error, TemplateError, TypeError, ValueError, InvalidRequestError) as error:
            what = str(error) if isinstance(error, InvalidRequestError) else f"{error}."
            yield BadRow(line, None, InvalidRequestError(what, field="template"))
            continue
        yield parser.read(line, {"prompt": prompt, "custom_id": record.get("custom_id") or None})
