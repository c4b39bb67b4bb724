"""A job and its journal: begun, gone on with, or refused."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quire.decode.params import SamplingParams
from quire.errors import InputFileError
from quire.jobs.files import find_files
from quire.jobs.journal import Journal, remove
from quire.jobs.lock import locked
from quire.jobs.output import Order, fits, is_stream
from quire.jobs.records import Record, read_records
from quire.jobs.rows import PROMPT_COLUMNS
from quire.jobs.settings import check_settings


@dataclass(frozen=True)
class Job:
    """What to read, with what to run it, and where to write; ``-`` is standard input or output.

    ``source``: files, folders or globs; ``template``: a file, or the text itself.

    ``settings`` are those that the results depend on (`quire.jobs.settings`); ``command`` runs the
    job again. ``journal`` None puts it beside the output, for a stream into a temporary folder.
    """

    source: tuple[str, ...]
    output: str
    params: SamplingParams
    model: str = "demo"
    template: str | None = None
    order: Order = "input"
    limit: int | None = None
    seed: int = 0
    dedupe: bool = True
    journal: Path | None = None
    fresh: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()

    def records(self) -> Iterator[Record]:
        """The rows of the input. Raises InputFileError."""
        columns = PROMPT_COLUMNS if self.template is None else frozenset[str]()
        return read_records(self.source, columns)

    @property
    def rereadable(self) -> bool:
        """Whether the input can be read more than once; a pipe cannot."""
        return not any(is_stream(file) for file in find_files(self.source))

    @property
    def journal_path(self) -> Path | None:
        """Where the journal is kept; None if it is not."""
        if self.journal is not None:
            return self.journal
        return None if is_stream(self.output) else Path(f"{self.output}.journal")

    @property
    def full_output(self) -> str:
        """The output by a name that is the same from every folder."""
        return self.output if is_stream(self.output) else str(Path(self.output).resolve())


@contextmanager
def open_job(job: Job) -> Iterator[Journal]:
    """The journal of ``job``, locked: a new one, or one that was begun with the same settings.

    Raises JournalError, and InputFileError for an output that is not the job's.
    """
    path = job.journal_path
    with ExitStack() as stack:
        _check_input(job)
        if path is None:
            folder = stack.enter_context(TemporaryDirectory(prefix="quire-"))
            path = Path(folder) / "journal"
        elif not job.fresh and not path.exists():
            _check_output(job, None)  # before anything is put beside it
        stack.enter_context(locked(path))
        if job.fresh:
            remove(path)
            if not is_stream(job.output):
                Path(job.output).unlink(missing_ok=True)
        journal = stack.enter_context(Journal(path, durable=job.journal_path is not None))
        if journal.blank:
            journal.create(
                settings=job.settings, created=int(time.time()), counts=[0, 0], exported=None
            )
        elif journal.get("counts")[0] == 0:  # nothing depends on the old ones yet
            journal.set(settings=job.settings)
        check_settings(journal.get("settings"), job.settings)
        _check_output(job, journal)
        journal.set(pid=os.getpid())
        yield journal


def begin(job: Job, journal: Journal) -> None:
    """Record that ``job`` runs from now on, and how to run it again."""
    journal.set(
        state="running",
        cancel=False,
        error=None,
        updated=time.time(),
        source=job.source,
        output=job.full_output,
        command=job.command,
        folder=os.getcwd(),
    )


def _check_input(job: Job) -> None:
    """Refuse to write over the input."""
    path = Path(job.output)
    if is_stream(job.output) or not path.exists():
        return
    if any(path.samefile(file) for file in find_files(job.source) if file != "-"):
        raise InputFileError(
            f"The results would replace the input {path}.",
            value=job.output,
            action="Give another name.",
        )


def _check_output(job: Job, journal: Journal | None) -> None:
    """Refuse to write over a file that is not this job's."""
    path = Path(job.output)
    if is_stream(job.output) or not path.exists() or not path.stat().st_size:
        return
    if journal is not None:
        mark = journal.get("exported")
        if journal.get("output") == job.full_output or (mark is not None and fits(path, mark)):
            return
    raise InputFileError(
        f"{path} exists already, and this job did not write it.",
        value=str(path),
        action="Give another name, or --fresh to replace it.",
    )
