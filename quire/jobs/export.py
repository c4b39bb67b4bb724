"""The finished rows of a job, whatever its state, in a file of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from quire.errors import InputFileError, JournalError
from quire.jobs.extras import require_pyarrow
from quire.jobs.journal import Journal
from quire.jobs.table import is_table, write_table


def export(journal: Journal, output: str, damaged: Callable[[JournalError], None]) -> int:
    """Write all finished rows in input order; returns their number.

    ``output`` is a JSON lines or Parquet file that must not exist, or ``-``; the file appears when
    it is complete. ``damaged`` is called if a part of the journal cannot be read. Raises
    InputFileError or OSError.
    """
    count = 0
    if output == "-":
        for _, line in journal.salvage(damaged):
            sys.stdout.buffer.write(f"{line}\n".encode())
            count += 1
        sys.stdout.buffer.flush()
        return count
    path = Path(output)
    if path.exists():
        raise InputFileError(f"{path} exists already.", value=output, action="Give another name.")
    if is_table(output):
        require_pyarrow("Writing Parquet")

        def counted() -> Iterator[tuple[int, str]]:
            nonlocal count
            for index, line in journal.salvage(damaged):
                count += 1
                yield index, line

        write_table(path, journal.get("source"), counted())
        return count
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            for _, line in journal.salvage(damaged):
                file.write(f"{line}\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count
