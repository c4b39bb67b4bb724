"""One run at a time for each journal. The system frees the lock of a process that is killed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from quire.errors import JournalError, QuireError
from quire.jobs.journal import Journal

_WAIT_SECONDS = 1.0  # longer than `is_locked` holds it


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the journal at ``path``. Raises JournalError if another run has it."""
    lock = FileLock(f"{path}.lock")
    try:
        if not path.parent.is_dir():  # the library would make it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        lock.acquire(timeout=_WAIT_SECONDS)
    except Timeout as error:
        raise JournalError(
            f"Another run has this job{_holder(path)}.",
            value=str(path),
            action="Wait for it, or end it with quire jobs cancel.",
        ) from error
    except OSError as error:
        raise JournalError(
            f"The journal {path} cannot be written: {error.strerror}.",
            value=str(path),
            action="Give another place with --journal.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a run has the journal at ``path``."""
    if not Path(f"{path}.lock").exists():
        return False
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def _holder(path: Path) -> str:
    try:
        with Journal(path) as journal:
            return "" if journal.blank else f": process {journal.get('pid')}"
    except QuireError:
        return ""
