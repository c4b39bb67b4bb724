"""CSV files with a header line."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator

from quire.errors import InputFileError, InvalidRequestError

LONGEST_FIELD = 64 << 20  # characters: what a quote that nobody closes can take into memory


class _Lines:
    """Physical lines, of which those after the first of a broken row can be read again."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.row: list[str] = []  # lines of the row that is being read
        self.number = 1  # of its first line
        self._text = text
        self._again: deque[str] = deque()
        self._damage: OSError | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._again:
            line = self._again.popleft()
        elif self._damage is not None:
            raise StopIteration
        else:
            try:
                line = next(self._text)
            except OSError as error:
                self._damage = error  # for the end: rows in an open quote are still to be read
                raise StopIteration from None
        self.row.append(line)
        return line

    def next_row(self) -> None:
        self.number += len(self.row)
        self.row = []

    def only_first_was_bad(self) -> None:
        self._again.extendleft(reversed(self.row[1:]))
        del self.row[1:]

    def end(self) -> None:
        """Raises the OSError that ended the lines early, if any."""
        if self._damage is not None:
            raise self._damage


def open_csv(
    stream: io.BufferedReader, file: str
) -> tuple[list[str], Iterator[tuple[int, dict[str, str] | InvalidRequestError]]]:
    """The names of the columns, and each row with the number of its first line (from 1).

    A row that is not CSV costs only its own first line: what an open quote has swallowed is read
    again as rows. Raises InputFileError or OSError; a damage of the stream comes after all rows
    before it.
    """
    csv.field_size_limit(LONGEST_FIELD)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    lines = _Lines(text)
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    while not any(header):
        lines.next_row()
        try:
            header = [name.strip() for name in next(reader)]
        except StopIteration:
            lines.end()
            return [], iter(())
        except csv.Error as error:
            raise InputFileError(
                f"The header line of {file} is not CSV: {error}.", value=file
            ) from error
    if not _is_utf8(header):
        raise InputFileError(
            f"The header line of {file} is not UTF-8.", value=file, action="Save it as UTF-8."
        )
    return header, _rows(reader, lines, header)


def _rows(
    reader: Iterator[list[str]], lines: _Lines, header: list[str]
) -> Iterator[tuple[int, dict[str, str] | InvalidRequestError]]:
    while True:
        lines.next_row()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            lines.only_first_was_bad()
            yield (
                lines.number,
                InvalidRequestError(
                    f"This row is not CSV: {error}.",
                    action="Is a quote not closed, or not doubled?",
                ),
            )
            continue
        if cells is None:
            lines.end()
            return
        if not cells or (len(lines.row) == 1 and not lines.row[0].strip()):
            continue
        yield lines.number, _columns(header, cells)


def _columns(header: list[str], cells: list[str]) -> dict[str, str] | InvalidRequestError:
    if len(cells) != len(header):
        return InvalidRequestError(
            f"The row has {len(cells)} fields; the header has {len(header)}.", value=len(cells)
        )
    if not _is_utf8(cells):
        return InvalidRequestError("This row is not UTF-8.", action="Save the file as UTF-8.")
    return dict(zip(header, cells, strict=True))


def _is_utf8(cells: list[str]) -> bool:
    """Whether no cell holds bytes that were escaped because they are not UTF-8."""
    text = "".join(cells)
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
