"""A Parquet file as the output of a job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from quire.errors import InputFileError
from quire.jobs.extras import require_pyarrow
from quire.jobs.files import find_files
from quire.jobs.journal import Finished, Journal
from quire.jobs.records import Record, read_records


class Table:
    """A Parquet file, made of journal and input when all rows are there. Raises InputFileError."""

    def __init__(self, path: Path, source: Sequence[str]) -> None:
        require_pyarrow("Writing Parquet")
        if not all(Path(file).is_file() for file in find_files(source)):
            raise InputFileError(
                "Parquet output keeps the columns of the input's files; standard input has none.",
                action="Give a file, or write JSONL.",
            )
        self._path = path
        self._source = source

    def resume(self, journal: Journal) -> None:
        """Nothing is written yet."""

    def extend(self, rows: Mapping[int, Finished], journal: Journal) -> None:
        """Nothing is written yet."""

    def mark(self) -> None:
        """There is none: the file is written as a whole."""

    def finish(self, journal: Journal, complete: bool) -> None:
        """Write the file if all rows are there."""
        if complete:
            write_table(self._path, self._source, journal.lines())

    def close(self) -> None:
        """Nothing is open."""


def write_table(path: Path, source: Sequence[str], lines: Iterable[tuple[int, str]]) -> None:
    """Write a Parquet file of the input's records and their lines, given by index."""
    from quire.jobs.parquet import input_schema, write_parquet  # needs the optional pyarrow

    rest = iter(lines)

    def pairs() -> Iterator[tuple[Record, str]]:
        index, line = next(rest, (-1, ""))
        for record in read_records(source):
            if record.index == index:
                yield record, line
                index, line = next(rest, (-1, ""))

    write_parquet(path, pairs(), input_schema(source))


def is_table(output: str) -> bool:
    """Whether results are written as Parquet."""
    return output.endswith(".parquet")
