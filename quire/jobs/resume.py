"""What is left of an input whose first runs were cut short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from quire.errors import JournalError
from quire.jobs.journal import Journal
from quire.jobs.records import Record

_ACTION = (
    "Give the input that the job was begun with; rows may be added at its end. For another one "
    "give another output, or start over with --fresh."
)


def unfinished(
    records: Iterable[Record],
    journal: Journal,
    limit: int | None,
    note: Callable[[bytes, int], None],
) -> Iterator[Record]:
    """The records, of the first ``limit``, that have no row in the journal.

    Those that have one are compared with it, and ``note`` gets its sharing key and index. Raises
    JournalError for a record that has changed or vanished since it was run.
    """
    finished = journal.finished()
    known = next(finished, None)
    count = 0
    for record in islice(records, limit):
        count += 1
        if known is None or record.index < known[0]:
            yield record
            continue
        if record.digest != known[1]:
            raise JournalError(
                f"Row {record.index + 1} (line {record.line} of {record.file}) is not what it was "
                "when it was run.",
                value=record.index,
                action=_ACTION,
            )
        if known[2] is not None:
            note(known[2], record.index)
        known = next(finished, None)
    if known is not None and (limit is None or known[0] < limit):
        raise JournalError(
            f"The input ends after {count} rows, but row {known[0] + 1} has been run.",
            value=count,
            limit=known[0],
            action=_ACTION,
        )


def verify(records: Iterable[Record], journal: Journal, limit: int | None) -> bool:
    """Compare all finished rows with the input, which is read as far as they go.

    Returns whether something is left to run. Raises JournalError as `unfinished` does.
    """
    last = journal.last()
    left = False
    for record in unfinished(records, journal, limit, lambda *_: None):
        left = True
        if record.index > last:
            break
    return left
