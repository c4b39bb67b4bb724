"""What the journal costs, and that memory stays flat: ``python benchmarks/journal.py``.

A backend that answers at once takes the place of the model, so that only the job's own work is
there. First at a fixed rate: the CPU time of the writing thread and the time that the computing
thread spends in handing rows over, waits for the disk included, as shares of the run. Then as fast
as it goes, over many rows, with the resident memory at several places, and once more with nothing
left to run, which compares the input with the journal.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from quire.api.outputs import CompletionOutput, RequestOutput, Stats
from quire.decode.params import SamplingParams
from quire.jobs import output, writer
from quire.jobs.job import Job
from quire.jobs.progress import Lines
from quire.jobs.run import run_job
from quire.jobs.writer import Writer

WINDOW = 32768


class Instant:
    """Answers window by window, each in random order, at ``rate`` rows a second if given."""

    policy = "none"
    stats = Stats()

    def __init__(self, rate: float | None, note: Callable[[int], None]) -> None:
        self.tokenizer = self
        self._rate = rate
        self._note = note
        self._random = random.Random(0)

    def __enter__(self) -> Instant:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def token_text(self, token: int) -> str:
        """No log-probabilities are asked for."""
        return str(token)

    def generate_iter(
        self,
        requests: Iterable[tuple[Any, SamplingParams]],
        *,
        on_step: Callable[[Stats], None] | None = None,
        on_groups: object = None,  # noqa: ARG002
    ) -> Generator[RequestOutput, None, None]:
        """One output for each request."""
        source = enumerate(requests)
        done, started = 0, time.perf_counter()

        def read() -> list[tuple[int, tuple[Any, SamplingParams]]]:
            return list(islice(source, WINDOW))

        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read)
            while window := ahead.result():
                ahead = reader.submit(read)
                self._random.shuffle(window)
                for number, (prompt, _) in window:
                    answer = CompletionOutput(0, "yes", [7, 8], None, None, "stop")
                    yield RequestOutput(number, prompt["prompt"], [1, 2, 3], [answer])
                    done += 1
                    self._note(done)
                    if self._rate is not None and done % 20 == 0:
                        wait = started + done / self._rate - time.perf_counter()
                        time.sleep(max(0.0, wait))
                if on_step is not None:
                    on_step(self.stats)


class Clock:
    """Adds up the time of calls: of the calling thread's CPU, or on the wall."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = 0.0
        self.calls = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        def timed(*words: Any, **options: Any) -> Any:
            started = self.clock()
            try:
                return function(*words, **options)
            finally:
                self.seconds += self.clock() - started
                self.calls += 1

        return timed


def write_input(path: Path, rows: int) -> None:
    """Short sampled prompts, all different."""
    with path.open("w") as file:
        file.writelines(
            f'{{"custom_id": "row {i}", "prompt": "Is {i} odd?"}}\n' for i in range(rows)
        )


def run(
    folder: Path, rows: int, rate: float | None, note: Callable[[int], None], fresh: bool = True
) -> float:
    """Seconds of a job."""
    write_input(folder / "in.jsonl", rows)
    job = Job((str(folder / "in.jsonl"),), str(folder / "out.jsonl"), SamplingParams(), fresh=fresh)
    started = time.perf_counter()
    found = run_job(job, lambda: Instant(rate, note), view=Lines(sys.stderr), say=lambda _: None)
    assert found.rows_ok == rows
    return time.perf_counter() - started


def overhead(folder: Path, rate: float, seconds: float) -> dict[str, float]:
    """Shares of a run at ``rate`` rows a second."""
    thread, put = Clock(time.thread_time), Clock(time.perf_counter)
    fsync, commit = Clock(time.perf_counter), Clock(time.perf_counter)
    patched = [(Writer, "_work", thread), (Writer, "put", put), (output.os, "fsync", fsync)]
    patched.append((writer.Journal, "add", commit))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    for owner, name, clock in patched:
        setattr(owner, name, clock.around(getattr(owner, name)))
    try:
        took = run(folder, int(rate * seconds), rate, lambda _: None)
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
    return {
        "rows": rate * seconds,
        "seconds": took,
        "rows_per_second": rate * seconds / took,
        "writer_cpu_share": thread.seconds / took,
        "handing_over_share": put.seconds / took,
        "journal_share": (thread.seconds + put.seconds) / took,
        "commits": commit.calls,
        "commit_ms": 1e3 * commit.seconds / commit.calls,
        "fsync_ms": 1e3 * fsync.seconds / fsync.calls,
    }


def memory(folder: Path, rows: int) -> dict[str, Any]:
    """Resident memory over a job of ``rows`` rows, as fast as it goes."""
    process = psutil.Process()
    places = {rows // 10, rows // 2, rows}
    rss: dict[int, int] = {}

    def note(done: int) -> None:
        if done in places:
            rss[done] = process.memory_info().rss

    took = run(folder, rows, None, note)
    compared = run(folder, rows, None, note, fresh=False)
    return {
        "rows": rows,
        "rows_per_second": rows / took,
        "compared_per_second": rows / compared,
        "rss_bytes": rss,
        "file_bytes": {p.name: p.stat().st_size for p in folder.iterdir()},
    }


def main() -> None:
    """Print both parts; the last line is JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=2000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="Where the files go. Default: a temporary one.")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.folder) as name:
        shares = overhead(Path(name), options.rate, options.seconds)
        print(
            f"at {shares['rows_per_second']:,.0f} rows/s the journal takes "
            f"{100 * shares['journal_share']:.2f}% of the run: "
            f"{100 * shares['writer_cpu_share']:.2f}% CPU of the writing thread, "
            f"{100 * shares['handing_over_share']:.2f}% handing over; {shares['commits']} commits "
            f"of {shares['commit_ms']:.1f} ms, fsync of the output {shares['fsync_ms']:.1f} ms"
        )
    with TemporaryDirectory(dir=options.folder) as name:
        large = memory(Path(name), options.rows)
        for rows, size in large["rss_bytes"].items():
            print(f"{rows:>10,} rows: {size / 2**20:.0f} MiB resident")
        print(
            f"{large['rows_per_second']:,.0f} rows/s; running again compares "
            f"{large['compared_per_second']:,.0f} rows/s; {json.dumps(large['file_bytes'])}"
        )
    print(json.dumps({"overhead": shares, "memory": large}))


if __name__ == "__main__":
    main()
