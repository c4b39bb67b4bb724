"""Kill jobs wherever they touch the disk, go on, and compare: ``python tests/jobs/faults.py``.

Every point is a job of its own in a process that is killed (SIGKILL) at the n-th statement, write
or fsync, or after a random time, up to three times; then the same job is run to its end. Nothing in
the package knows of this: the process patches what the package calls.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from fake_llm import FakeLLM
from quire.decode.params import SamplingParams
from quire.jobs import job as job_module
from quire.jobs import output as output_module
from quire.jobs import writer as writer_module
from quire.jobs.job import Job
from quire.jobs.journal import Journal
from quire.jobs.progress import Lines
from quire.jobs.run import run_job

ROWS = 40
CREATED = 1_700_000_000


class Killer:
    """Counts what goes to the disk and ends the process at number ``at``."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.count = 0

    def event(self, halfway: Callable[[], object] = lambda: None) -> None:
        self.count += 1
        if self.count == self.at:
            halfway()
            os.kill(os.getpid(), signal.SIGKILL)

    def patch(self) -> None:
        killer = self

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
                if statement.startswith("SELECT"):
                    return super().execute(statement, *values)
                killer.event()
                found = super().execute(statement, *values)
                killer.event()
                return found

            def close(self) -> None:
                killer.event()
                super().close()
                killer.event()

        class File:
            def __init__(self, path: Any, mode: str, **options: Any) -> None:
                killer.event()
                self.file = open(path, mode, **options)  # noqa: SIM115

            def write(self, data: memoryview) -> int:
                killer.event(lambda: self.file.write(data[: len(data) // 2]))
                return self.file.write(data)

            def truncate(self, size: int) -> None:
                killer.event()
                self.file.truncate(size)
                killer.event()

            def __enter__(self) -> Any:
                return self.file

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        connect, fsync, unlink = sqlite3.connect, os.fsync, os.unlink

        def killing(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*words: Any, **options: Any) -> Any:
                killer.event()
                found = function(*words, **options)
                killer.event()
                return found

            return call

        sqlite3.connect = lambda *w, **o: connect(*w, **o, factory=Connection)  # type: ignore
        os.fsync, os.unlink = killing(fsync), killing(unlink)
        output_module.open = File  # type: ignore[attr-defined]


@dataclass
class Scenario:
    """A kind of job."""

    name: str
    records: list[Any]
    changes: dict[str, Any] = field(default_factory=dict)
    again: bool = False  # start over a job that is there, with --fresh


@dataclass
class Result:
    """What all points found."""

    points: int = 0
    kills: int = 0
    runs: int = 0
    killed_by: Counter[str] = field(default_factory=Counter)
    boundaries: dict[str, int] = field(default_factory=dict)  # of an undisturbed run
    problems: list[str] = field(default_factory=list)


def records(chance: random.Random) -> list[Any]:
    """Good and bad rows, sampled, greedy and equal ones."""
    rows: list[Any] = []
    for i in range(ROWS):
        kind = chance.randrange(8)
        if kind == 0:
            rows.append("{broken")
        elif kind == 1:
            rows.append({"prompt": f"too long {i}"})
        elif kind <= 3:
            rows.append({"prompt": f"again {chance.randrange(4)}", "temperature": 0, "id": i})
        else:
            rows.append({"prompt": f"row {i} " + "x" * chance.randrange(300)})
    return rows


class Point:
    """One job in a folder of its own."""

    def __init__(self, folder: Path, scenario: Scenario) -> None:
        self.folder = folder
        self.scenario = scenario
        self.output = folder / "out.jsonl"
        self.journal = folder / "out.jsonl.journal"
        self.asked = folder / "asked"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in scenario.records]
        (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def start(self, killer: Killer, slow: float = 0.0, **changes: Any) -> int:
        """Run the job in a child; returns its process id."""
        self.asked.write_text("")
        process = os.fork()
        if process:
            return process
        try:
            killer.patch()
            job_module.time = SimpleNamespace(time=lambda: CREATED)  # type: ignore[assignment]
            writer_module.COMMIT_ROWS, writer_module.MOST_BYTES = 5, 100_000
            writer_module.COMMIT_SECONDS = 0.004
            log = os.open(self.asked, os.O_WRONLY | os.O_APPEND)

            def ask(prompt: str) -> None:
                os.write(log, f"{prompt}\n".encode())
                time.sleep(slow)

            os.chdir(self.folder)
            job = Job(("in.jsonl",), "out.jsonl", SamplingParams(), seed=1)
            job = Job(**{**vars(job), **self.scenario.changes, **changes})
            run_job(job, lambda: FakeLLM(ask, window=9), view=Lines(sys.stderr), say=lambda _: None)
            (self.folder / "events").write_text(str(killer.count))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(3)

    def committed(self) -> dict[int, str]:
        """The finished rows, as the next run will see them."""
        if not self.journal.exists():
            return {}
        with Journal(self.journal) as journal:
            return {} if journal.blank else dict(journal.lines())

    def prompts(self, rows: dict[int, str]) -> set[str]:
        """The prompts of ``rows``."""
        found = (self.scenario.records[i] for i in rows)
        return {record["prompt"] for record in found if isinstance(record, dict)}


def finish(process: int) -> bool:
    """Wait for a child; whether it was killed. RuntimeError if it failed."""
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"the run ended with status {os.WEXITSTATUS(status)}")
    return False


def try_point(
    point: Point, whole: list[bytes], first: int, events: int, chance: random.Random, result: Result
) -> None:
    """Kill at event ``first`` or after a while, go on, kill, go on, and compare at every step."""
    result.points += 1
    before: dict[int, str] = {}
    if point.scenario.again:
        finish(point.start(Killer(None), seed=7, settings={"seed": 7}))
    for kills_left in range(chance.randint(1, 3), -1, -1):
        slow = 0.0
        killer = Killer(None)
        seconds = None
        if kills_left:
            if chance.random() < 0.3:
                slow, seconds = 0.001, chance.uniform(0, 0.12)
            else:
                killer = Killer(first)
                first = chance.randint(1, events)
        process = point.start(killer, slow)
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        killed = finish(process)
        result.runs += 1
        result.kills += killed
        result.killed_by["time" if seconds is not None else "event"] += killed
        after = point.committed()
        asked = point.asked.read_text().splitlines()
        if not point.scenario.again:  # which forgets on purpose
            assert before.items() <= after.items(), "committed rows are gone"
            assert not point.prompts(before) & set(asked), "a committed row was computed again"
        assert len(asked) == len(set(asked)), "a row was computed twice in a run"
        if point.output.exists() and not point.scenario.again:
            lines = point.output.read_bytes().split(b"\n")[:-1]
            assert {line.decode() for line in lines} <= set(after.values()), "a line too early"
        before = after
    written = point.output.read_bytes().splitlines()
    if point.scenario.changes.get("order") == "completion":
        written, whole = sorted(written), sorted(whole)
    assert written == whole, "the output is not that of an undisturbed run"
    names = {"in.jsonl", "out.jsonl", "out.jsonl.journal", "out.jsonl.journal.lock"}
    assert {p.name for p in point.folder.iterdir()} == names | {"asked", "events"}, "debris"


def run_points(points: int, seed: int, folder: Path) -> Result:
    """Try ``points`` jobs. The same seed gives the same jobs and points."""
    chance = random.Random(seed)
    rows = records(chance)
    settings = {"settings": {"seed": 1}}
    scenarios = [
        Scenario("input order", rows, settings),
        Scenario("completion order", rows, {**settings, "order": "completion"}),
        Scenario("start over", rows, {**settings, "fresh": True}, again=True),
        Scenario("computed each", rows, {**settings, "dedupe": False}),
    ]
    result = Result()
    each = -(-points // len(scenarios))
    for number, scenario in enumerate(scenarios):
        if (
            scenario.name == "computed each"
        ):  # then equal prompts are computed again: make them differ
            scenario.records = [
                {**r, "prompt": f"{r['prompt']} {i}"} if isinstance(r, dict) else r
                for i, r in enumerate(rows)
            ]
        twin_folder = folder / f"whole {number}"
        twin_folder.mkdir()
        twin = Point(twin_folder, scenario)
        if scenario.again:
            finish(twin.start(Killer(None), seed=7, settings={"seed": 7}))
        finish(twin.start(Killer(None)))
        whole = twin.output.read_bytes().splitlines()
        assert len(whole) == ROWS
        events = int((twin_folder / "events").read_text())
        result.boundaries[scenario.name] = events
        for count in range(each):
            with TemporaryDirectory(dir=folder) as inner:
                place = random.Random(f"{seed}/{number}/{count}")
                try:
                    first = 1 + count * events // each
                    try_point(Point(Path(inner), scenario), whole, first, events, place, result)
                except (AssertionError, RuntimeError) as error:
                    result.problems.append(f"{scenario.name}, point {count}: {error}")
    return result


def main() -> None:
    """Print the result as JSON; exit status 1 if there was a problem."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        result = run_points(options.points, options.seed, Path(folder))
    print(json.dumps({**vars(result), "seconds": round(time.perf_counter() - started, 1)}))
    sys.exit(bool(result.problems))


if __name__ == "__main__":
    main()
