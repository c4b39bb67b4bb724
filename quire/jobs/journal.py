"""The journal of a job: what is finished, in one SQLite file that survives a kill at any moment.

``rows`` holds one row for each finished record of the input and nothing else: what is not there is
still to be done. They are in the order in which they were finished (``seq``), so that a commit
writes few pages; an index finds them by their place in the input (``idx``). ``meta`` holds the
job's settings and state as JSON values. The file is in WAL mode with synchronous=FULL: what a
transaction wrote is on disk when its commit returns, and others may read while a run writes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from quire.errors import JournalError

By = Literal["idx", "seq"]
FORMAT = 1
APPLICATION = 0x51756972  # "Quir", in the header that SQLite gives to applications
BUSY_SECONDS = 30.0  # how long to wait for another process that is writing
PAGE_ROWS = 1000
_MOST_ROWS = 1024  # of one INSERT; five values each stay far below SQLite's limit of 32,766
_COLUMNS = "idx, digest, key, failed, line"
_SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    "CREATE TABLE rows (seq INTEGER PRIMARY KEY, idx INTEGER, digest BLOB, key BLOB, "
    "failed INTEGER, line TEXT)",
    "CREATE UNIQUE INDEX rows_by_idx ON rows (idx)",
)
_NOT_DAMAGED = {  # beginnings of SQLite's names of errors, and what to do
    "SQLITE_FULL": "Make room",
    "SQLITE_IOERR": "See to the disk",
    "SQLITE_READONLY": "Allow writing to it and to its folder",
    "SQLITE_CANTOPEN": "Allow writing to it and to its folder",
    "SQLITE_BUSY": "Wait for the process that uses it",
}
START_OVER = "Start over with --fresh; quire jobs export first saves what can be read of it."


class Finished(NamedTuple):
    """A finished row: ``idx`` counts from 0, ``line`` is its line of the output.

    ``digest`` is the input record's; ``key`` that of prompt and parameters, or None where equal
    rows may not share an answer.
    """

    idx: int
    digest: bytes
    key: bytes | None
    failed: bool
    line: str


class Journal:
    """A connection to a journal; opens ``path`` and makes it if there is none. JournalError.

    For one thread at a time. ``durable`` False leaves out the waiting for the disk; ``salvage``
    opens also a file that is shorter than it says.
    """

    def __init__(self, path: Path, *, durable: bool = True, salvage: bool = False) -> None:
        self.path = path
        self.durable = durable
        try:
            # SQLite's own message has no reason. Never open the file of a journal that is there:
            # closing it again would drop the locks of this process's other connections to it.
            if not path.exists():
                path.touch()
        except OSError as error:
            raise JournalError(
                f"The journal {path} cannot be written: {error.strerror}.",
                value=str(path),
                action="Give another place with --journal.",
            ) from error
        with self._readable():
            self._db = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            if salvage:
                self._one("PRAGMA writable_schema = ON")  # SQLite's word for reading all the same
            self._check_format()
            self._one(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """The last connection folds the write-ahead log into the file."""
        self._db.close()

    def create(self, **meta: object) -> None:
        """Lay out a journal that is `blank`, all or nothing."""
        with self._readable():
            self._one("PRAGMA journal_mode = WAL")
        with self._transaction():
            for statement in (*_SCHEMA, f"PRAGMA application_id = {APPLICATION}"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {FORMAT}")
            self._put(meta)
        self.blank = False

    def _check_format(self) -> None:
        """Set `blank`; raise JournalError for what is no journal that can be read here."""
        with self._readable():
            application = self._one("PRAGMA application_id")
            version = self._one("PRAGMA user_version")
            self.blank = not self._one("SELECT count(*) FROM sqlite_master")
        if self.blank and not application:
            return
        if application != APPLICATION:
            raise JournalError(
                f"{self.path} is not a journal of quire.",
                value=str(self.path),
                action="Give another place with --journal.",
            )
        if version != FORMAT:
            raise JournalError(
                f"The journal {self.path} has format {version}; this quire reads {FORMAT}.",
                value=version,
                limit=FORMAT,
                action="Use the quire that wrote it, or start over with --fresh.",
            )

    def get(self, key: str) -> Any:
        """A value of ``meta``; None if there is none."""
        with self._readable():
            found = self._one("SELECT value FROM meta WHERE key = ?", key)
            return None if found is None else json.loads(found)

    def set(self, **meta: object) -> None:
        """Change values of ``meta``, in one transaction."""
        with self._transaction():
            self._put(meta)

    def add(self, rows: Sequence[Finished], **meta: object) -> None:
        """Commit finished rows and values of ``meta`` together."""
        with self._transaction():
            start = 0
            while start < len(rows):
                # Few large statements: each one gives Python's lock away and has to get it back.
                size = min(1 << ((len(rows) - start).bit_length() - 1), _MOST_ROWS)
                self._db.execute(
                    f"INSERT INTO rows ({_COLUMNS}) VALUES {', '.join(['(?, ?, ?, ?, ?)'] * size)}",
                    [value for row in rows[start : start + size] for value in row],
                )
                start += size
            self._put(meta)

    def remove_failed(self, **meta: object) -> None:
        """Forget the rows that failed, and change values of ``meta`` with it."""
        with self._transaction():
            self._db.execute("DELETE FROM rows WHERE failed")
            self._put(meta)

    def last(self, by: By = "idx") -> int:
        """The largest index, or place in the order of finishing, of a row; -1 if there is none."""
        with self._readable():
            found = self._one(f"SELECT max({by}) FROM rows")
            return -1 if found is None else int(found)

    def line(self, index: int) -> str | None:
        """The output line of a finished row."""
        with self._readable():
            found = self._one("SELECT line FROM rows WHERE idx = ?", index)
            return None if found is None else str(found)

    def text(self, start: int, stop: int, by: By = "idx") -> str:
        """The lines of the rows in ``[start, stop)``, in input order or that of finishing."""
        with self._readable():
            found = self._one(
                "SELECT group_concat(line, char(10)) FROM "
                f"(SELECT line FROM rows WHERE {by} >= ? AND {by} < ? ORDER BY {by})",
                start,
                stop,
            )
            return "" if found is None else f"{found}\n"

    def finished(self, start: int = 0) -> Iterator[tuple[int, bytes, bytes | None]]:
        """``(index, digest, key)`` of the finished rows from ``start`` on, in input order.

        Read in pages, each complete before it is used: a reader that waits within a transaction
        would keep SQLite from emptying the write-ahead log.
        """
        while True:
            with self._readable():
                page = self._db.execute(
                    "SELECT idx, digest, key FROM rows WHERE idx >= ? ORDER BY idx LIMIT ?",
                    (start, PAGE_ROWS),
                ).fetchall()
            yield from page
            if len(page) < PAGE_ROWS:
                return
            start = page[-1][0] + 1

    def lines(self, start: int = 0) -> Iterator[tuple[int, str]]:
        """``(index, line)`` of the finished rows from ``start`` on, in input order."""
        while True:
            count = 0
            with self._readable():
                for index, line in self._db.execute(
                    "SELECT idx, line FROM rows WHERE idx >= ? ORDER BY idx LIMIT ?",
                    (start, PAGE_ROWS),
                ):
                    start = index + 1
                    count += 1
                    yield index, line
            if count < PAGE_ROWS:
                return

    def salvage(self, damaged: Callable[[JournalError], None]) -> Iterator[tuple[int, str]]:
        """Like `lines`, but ``damaged`` is called for damage, and what else can be read follows."""
        last = -1
        try:
            for index, line in self.lines():
                with self._readable():
                    _check(line)
                last = index
                yield index, line
            return
        except JournalError as error:
            damaged(error)
        places: dict[int, int] = {}
        for order in ("", "DESC"):  # up to the damage, then from the end back to it
            with suppress(sqlite3.DatabaseError):
                for index, place in self._db.execute(
                    f"SELECT idx, seq FROM rows NOT INDEXED ORDER BY seq {order}"
                ):
                    if isinstance(index, int) and index > last:
                        places[index] = place
        for index in sorted(places):
            with suppress(sqlite3.DatabaseError):
                line = self._one("SELECT line FROM rows WHERE seq = ?", places[index])
                _check(line)
                yield index, line

    def _one(self, statement: str, *values: object) -> Any:
        """The first column of the first row; None if there is no row."""
        row = self._db.execute(statement, values).fetchone()
        return None if row is None else row[0]

    def _put(self, meta: dict[str, object]) -> None:
        for key, value in meta.items():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._readable():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors have rolled back already
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """SQLite's errors in the words of `JournalError`."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "")
            remedy = next((v for k, v in _NOT_DAMAGED.items() if name.startswith(k)), None)
            if remedy is not None:
                raise JournalError(
                    f"The journal {self.path} cannot be used: {error}.",
                    value=str(self.path),
                    action=f"{remedy} and run the same command again"
                    + (": what is finished is kept." if self.durable else "."),
                ) from error
            raise JournalError(
                f"The journal {self.path} is damaged: {error}.",
                value=str(self.path),
                action=START_OVER,
            ) from error


def _check(line: object) -> None:
    """SQLite has no checksums: a damaged page may read as rows. Raises DatabaseError."""
    try:
        json.loads(line)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise sqlite3.DatabaseError("a row holds no result") from error


def remove(path: Path) -> None:
    """Delete a journal with all that SQLite keeps beside it."""
    for ending in ("", "-wal", "-shm"):  # the journal first: a log without one is never read
        Path(f"{path}{ending}").unlink(missing_ok=True)
