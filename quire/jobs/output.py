"""The output file as a copy of the journal: committed rows are appended to it.

How far it got is itself recorded in the journal (the mark), so that a run that goes on after a kill
cuts off what was written after the last mark and writes it again, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from quire.errors import InputFileError
from quire.jobs.journal import By, Finished, Journal
from quire.jobs.table import Table, is_table

Order = Literal["input", "completion"]
Mark = Mapping[str, Any]  # order; bytes and tail of the file; next: the row that comes after it
CHUNK_ROWS = 256  # lines read from the journal at a time
_TAIL_BYTES = 4096


class Output(Protocol):
    """Where results go. ``journal`` is the writing thread's. Raises OSError."""

    def resume(self, journal: Journal) -> None:
        """Write what the journal has and the output has not."""
        ...

    def extend(self, rows: Mapping[int, Finished], journal: Journal) -> None:
        """Rows that have just been committed."""
        ...

    def mark(self) -> Mark | None:
        """How far the output has got."""
        ...

    def finish(self, journal: Journal, complete: bool) -> None:
        """No rows will come any more; ``complete`` if all rows of the input are there."""
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


class Lines:
    """JSON lines to a file or a stream.

    In completion order these are the rows of the journal in the order of their commits. In input
    order a row waits, in the journal alone, until all before it are written.
    """

    def __init__(self, sink: FileSink | StreamSink, order: Order) -> None:
        self._sink = sink
        self._order = order
        self._by: By = "idx" if order == "input" else "seq"
        self._next = 0  # all rows before this one are written
        self._early = bytearray()  # one byte for each row from _next on: whether it is committed

    def resume(self, journal: Journal) -> None:
        """Write what the journal has and the output has not."""
        mark = self._sink.found
        if mark is not None and mark["order"] != self._order:
            mark = None
        if mark is None:
            journal.set(exported=None)  # before the file changes: the old mark means nothing now
        self._sink.start(mark)
        self._next = mark["next"] if mark is not None else 0
        if self._by == "idx":
            for index, _, _ in journal.finished(self._next):
                self._note(index)
            self._advance({}, journal)
        else:
            self._catch_up(journal)
        self._sink.sync()

    def extend(self, rows: Mapping[int, Finished], journal: Journal) -> None:
        """Rows that have just been committed."""
        if self._by == "idx":
            for index in rows:
                self._note(index)
            self._advance(rows, journal)
        else:
            self._catch_up(journal)
        self._sink.sync()

    def mark(self) -> Mark | None:
        """How far the output has got."""
        place = self._sink.place()
        return None if place is None else {"order": self._order, "next": self._next, **place}

    def finish(self, journal: Journal, complete: bool) -> None:
        """A stream gets what was held back: nobody would write it later."""
        if not complete and self._sink.place() is None:
            self._copy(journal, self._next, self._next + len(self._early))
            self._sink.sync()

    def close(self) -> None:
        """Give the file back."""
        self._sink.close()

    def _note(self, index: int) -> None:
        place = index - self._next
        if place >= len(self._early):
            self._early.extend(bytes(place + 1 - len(self._early)))
        self._early[place] = 1

    def _advance(self, rows: Mapping[int, Finished], journal: Journal) -> None:
        """Write the rows from ``_next`` on as far as there is no gap."""
        gap = self._early.find(0)
        end = self._next + (gap if gap >= 0 else len(self._early))
        start = self._next
        while start < end and start in rows:
            start += 1
        if start > self._next:  # those that were just committed need no reading
            self._sink.write("".join(f"{rows[i].line}\n" for i in range(self._next, start)))
        self._copy(journal, start, end)
        del self._early[: end - self._next]
        self._next = end

    def _catch_up(self, journal: Journal) -> None:
        """Write all rows from ``_next`` on."""
        end = journal.last("seq") + 1
        self._copy(journal, self._next, end)
        self._next = max(self._next, end)

    def _copy(self, journal: Journal, start: int, stop: int) -> None:
        for first in range(start, stop, CHUNK_ROWS):
            self._sink.write(journal.text(first, min(first + CHUNK_ROWS, stop), self._by))


class FileSink:
    """A file that is cut back to the mark. Raises InputFileError if it cannot be written.

    ``found`` is the recorded mark if the file is still as it says, else None.
    """

    def __init__(self, path: Path, mark: Mark | None) -> None:
        self.found = mark if mark is not None and fits(path, mark) else None
        self._tail = _tail(path, self.found["bytes"]) if self.found is not None else b""
        self._bytes = 0
        self._file = _open(path)

    def start(self, mark: Mark | None) -> None:
        """Cut the file back to the mark, or to nothing."""
        self._bytes = mark["bytes"] if mark is not None else 0
        self._tail = self._tail if mark is not None else b""
        self._file.truncate(self._bytes)

    def write(self, text: str) -> None:
        """Append lines."""
        data = text.encode()
        _write(self._file, data)
        self._bytes += len(data)
        self._tail = (self._tail + data[-_TAIL_BYTES:])[-_TAIL_BYTES:]

    def sync(self) -> None:
        """Return when all is on disk."""
        os.fsync(self._file.fileno())

    def place(self) -> dict[str, Any]:
        """Where the file ends, and a digest of its last bytes to know it by."""
        return {"bytes": self._bytes, "tail": _digest(self._tail)}

    def close(self) -> None:
        """Give the file back."""
        self._file.close()


class StreamSink:
    """Standard output or a device: not cut back, so that everything is written from the start."""

    found: Mark | None = None

    def __init__(self, name: str) -> None:
        self._stream = sys.stdout.buffer if name == "-" else _open(Path(name))

    def start(self, mark: Mark | None) -> None:
        """Nothing to do."""

    def write(self, text: str) -> None:
        """Append lines."""
        _write(self._stream, text.encode())

    def sync(self) -> None:
        """Hand everything on."""
        self._stream.flush()

    def place(self) -> None:
        """A stream has none."""

    def close(self) -> None:
        """Leave standard output open."""
        if self._stream is not sys.stdout.buffer:
            self._stream.close()


def open_output(name: str, order: Order, mark: Mark | None, source: Sequence[str]) -> Output:
    """The output called ``name``, to go on from ``mark`` if it can. Raises InputFileError.

    ``source``: the input's files, whose columns a table keeps.
    """
    if is_table(name):
        return Table(Path(name), source)
    return Lines(StreamSink(name) if is_stream(name) else FileSink(Path(name), mark), order)


def is_stream(output: str) -> bool:
    """Whether results go to standard output or to something else that is no file."""
    return output == "-" or (Path(output).exists() and not Path(output).is_file())


def fits(path: Path, mark: Mark) -> bool:
    """Whether the file at ``path`` still has the bytes that ``mark`` was recorded after."""
    return bool(_digest(_tail(path, mark["bytes"])) == mark["tail"])


def _tail(path: Path, end: int) -> bytes:
    """The bytes before offset ``end``; fewer where there is no such file or it is shorter."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, end - _TAIL_BYTES))
            return file.read(min(end, _TAIL_BYTES))
    except OSError:
        return b""


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _open(path: Path) -> IO[bytes]:
    """Without a buffer, so that closing after an error has nothing left to write."""
    try:
        return open(path, "ab", buffering=0)
    except OSError as error:
        raise InputFileError(
            f"{path} cannot be written: {error.strerror}.", value=str(path)
        ) from error


def _write(file: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
