"""The thread that makes finished rows durable: commits them in groups, then writes the output."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Literal

from quire.errors import JournalError, QuireError
from quire.jobs.journal import Finished, Journal
from quire.jobs.output import Output

State = Literal["running", "interrupted", "cancelled", "failed", "done"]
COMMIT_SECONDS = 0.25
COMMIT_ROWS = 1000
COMMIT_BYTES = 8 << 20
MOST_BYTES = 4 * COMMIT_BYTES  # of rows not yet committed; with more, `put` waits for the disk
ROW_BYTES = 1000  # of a row, about, besides its line
CANCEL_SECONDS = 0.5  # between looks for a request to stop


class Writer:
    """Takes finished rows from any thread. Owns ``journal`` and uses ``output`` from `start` on.

    ``reader`` is another connection to the same journal, used by the thread that calls `line`.
    ``rows`` and ``failed`` count the finished rows of the job, with those of earlier runs.
    """

    def __init__(self, journal: Journal, reader: Journal, output: Output) -> None:
        self.rows, self.failed = journal.get("counts")
        self.cancelled = False
        self._journal = journal
        self._reader = reader
        self._output = output
        self._changed = threading.Condition()
        self._waiting: dict[int, Finished] = {}
        self._committing: dict[int, Finished] = {}
        self._bytes = 0  # of what waits
        self._ending: State | None = None
        self._error: BaseException | None = None
        # A daemon, so that a second interrupt ends the process at once; nothing is lost by that.
        self._thread = threading.Thread(target=self._work, name="quire-journal", daemon=True)

    def start(self) -> None:
        """Begin; brings the output up to the journal first."""
        self._thread.start()

    def put(self, row: Finished) -> None:
        """Hand over a finished row; waits when the disk is far behind. Raises JournalError."""
        with self._changed:
            while self._bytes >= MOST_BYTES and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            self._waiting[row.idx] = row
            self.rows += 1
            self.failed += row.failed
            self._bytes += ROW_BYTES + len(row.line)
            if self._has_work():
                self._changed.notify_all()

    def line(self, index: int) -> str | None:
        """The line of a row that was handed over in this run or an earlier one."""
        with self._changed:
            row = self._waiting.get(index) or self._committing.get(index)
        return self._reader.line(index) if row is None else row.line

    def check(self) -> None:
        """Raise what stopped the thread, or KeyboardInterrupt when the job is to be cancelled."""
        if self._error is not None:
            raise self._error
        if self.cancelled:
            raise KeyboardInterrupt

    def finish(self, state: State) -> None:
        """Commit what is left, complete the output, record ``state``. Raises JournalError."""
        with self._changed:
            self._ending = state
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        with self._journal as journal:
            try:
                self._write(journal)
            except OSError as error:
                problem = JournalError(
                    f"The results cannot be written: {error.strerror}.",
                    value=str(journal.path),
                    action="What is finished is safe in the journal: make room and run the same "
                    "command again."
                    if journal.durable
                    else "",
                )
                problem.__cause__ = error
                self._stop(journal, problem)
            except BaseException as error:  # whatever it is, the run must not go on without it
                self._stop(journal, error)

    def _write(self, journal: Journal) -> None:
        self._output.resume(journal)
        journal.set(exported=self._output.mark())
        rows, failed = journal.get("counts")
        looked = time.monotonic()
        ending: State | None = None
        while ending is None:
            with self._changed:
                self._changed.wait_for(self._has_work, COMMIT_SECONDS)
                ending = self._ending
                batch = self._committing = self._waiting
                self._waiting, self._bytes = {}, 0
                self._changed.notify_all()
            if batch:
                rows += len(batch)
                failed += sum(row.failed for row in batch.values())
                journal.add(
                    list(batch.values()),
                    counts=[rows, failed],
                    exported=self._output.mark(),
                    updated=time.time(),
                )
                self._output.extend(batch, journal)
            if time.monotonic() - looked >= CANCEL_SECONDS:
                looked = time.monotonic()
                self.cancelled = bool(journal.get("cancel"))
        self._output.finish(journal, complete=ending == "done")
        journal.set(state=ending, exported=self._output.mark(), updated=time.time())

    def _has_work(self) -> bool:
        full = len(self._waiting) >= COMMIT_ROWS or self._bytes >= COMMIT_BYTES
        return full or self._ending is not None

    def _stop(self, journal: Journal, error: BaseException) -> None:
        with suppress(QuireError):
            journal.set(state="failed", error=str(error))
        with self._changed:
            self._error = error
            self._changed.notify_all()
