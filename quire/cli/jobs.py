"""``quire jobs``: look at jobs through their journals, end them, run them again."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from quire.errors import JournalError, QuireError
from quire.jobs.export import export as export_results
from quire.jobs.journal import Journal
from quire.jobs.lock import is_locked, locked
from quire.jobs.table import is_table

app = typer.Typer(
    help="Jobs of quire run: list, show, cancel, retry, export.", no_args_is_help=True
)
JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job's output, or its journal.")]


@app.command("list")
def list_jobs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look.")] = Path("."),
) -> None:
    """List the jobs whose journals are in FOLDER."""
    with _messages():
        paths = sorted(folder.glob("*.journal"))
        if not paths:
            print(f"quire: there are no journals in {folder}.", file=sys.stderr)
        for path in paths:
            name = str(path).removesuffix(".journal")
            try:
                with Journal(path) as journal:
                    rows, failed = _counts(journal)
                    print(f"{name}: {_state(journal)}, {rows} rows, {failed} failed")
            except JournalError as error:
                print(f"{name}: {error.what}")


@app.command()
def show(job: JobName) -> None:
    """Say where a job stands and how it was started."""
    with _messages(), _open(job) as journal:
        rows, failed = _counts(journal)
        lines = [
            ("job", journal.get("output")),
            ("state", _state(journal)),
            ("finished", f"{rows} rows, {failed} of them failed"),
            ("input", " ".join(journal.get("source") or ()) or None),
            ("begun", _when(journal.get("created"))),
            ("last change", _when(journal.get("updated"))),
            ("error", journal.get("error")),
            ("command", shlex.join(["quire", *(journal.get("command") or [])])),
            ("in folder", journal.get("folder")),
        ]
        for name, value in lines:
            if value is not None:
                print(f"{name:<13}{value}")
        for name, value in (journal.get("settings") or {}).items():
            print(f"  {name:<19}{value}")


@app.command()
def cancel(job: JobName) -> None:
    """End a running job as Ctrl-C would; running it again goes on."""
    with _messages(), _open(job) as journal:
        if not is_locked(journal.path):
            raise JournalError(f"The job {job} is not running.", value=job)
        journal.set(cancel=True)
        print(f"Process {journal.get('pid')} ends when its step is done.", file=sys.stderr)


@app.command()
def retry_failed(job: JobName) -> None:
    """Run the failed rows of a job once more, with the command that it was started with."""
    with _messages(), _open(job) as journal:
        command, folder = journal.get("command"), journal.get("folder")
        if not command:
            raise JournalError(f"The job {job} was not started by quire run.", value=job)
        with locked(journal.path):
            rows, failed = _counts(journal)
            # The output is written anew, so that what is in input order stays in input order.
            journal.remove_failed(counts=[rows - failed, 0], exported=None, state="interrupted")
        print(f"{failed} failed rows to run again", file=sys.stderr, flush=True)
        os.chdir(folder)
    os.execv(sys.executable, [sys.executable, "-m", "quire", *command])


@app.command()
def export(
    job: JobName,
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="JSONL or .parquet file, or - for standard output."),
    ] = "-",
) -> None:
    """Write the finished rows of a job, in input order, also while it runs.

    Of a damaged journal, what can still be read. Exit status 1 if there was damage.
    """
    problems: list[JournalError] = []
    with _messages(), _open(job, salvage=True) as journal:
        if is_table(output):  # keeps the columns of the input, whose name may be relative
            output = str(Path(output).resolve())
            os.chdir(journal.get("folder"))
        count = export_results(journal, output, problems.append)
    for problem in problems:
        print(f"quire: {problem.what}", file=sys.stderr)
    print(f"{count} rows written to {output}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)


@contextmanager
def _messages() -> Iterator[None]:
    try:
        yield
    except (QuireError, OSError) as error:
        print(f"quire: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def _open(job: str, salvage: bool = False) -> Journal:
    """The journal that ``job`` names. Raises JournalError."""
    beside = Path(f"{job}.journal")
    path = beside if beside.exists() else Path(job)
    if not path.is_file():
        raise JournalError(
            f"There is no job {job}: no {beside} either.",
            value=job,
            action="Give the job's output or its journal.",
        )
    journal = Journal(path, salvage=salvage)
    if journal.blank:
        journal.close()
        raise JournalError(f"The job {job} has not begun.", value=job)
    return journal


def _counts(journal: Journal) -> tuple[int, int]:
    if journal.blank:
        return 0, 0
    rows, failed = journal.get("counts")
    return rows, failed


def _state(journal: Journal) -> str:
    """What the journal says, if nobody who should be running it was killed."""
    if journal.blank:
        return "not begun"
    state: str = journal.get("state") or "not begun"
    if is_locked(journal.path):
        return "running"
    return "stopped" if state == "running" else state


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
