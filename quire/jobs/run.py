"""A batch job: rows in, results out, nothing held longer than a window of rows."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from quire.api.generator import Generator
from quire.api.setup import Prompt
from quire.decode.params import SamplingParams
from quire.engine.budget import format_bytes
from quire.errors import InputFileError
from quire.jobs.progress import Snapshot, View, format_seconds
from quire.jobs.results import Ordered, result_line
from quire.jobs.rows import BadRow, Row, RowParser
from quire.jobs.source import read_rows


@dataclass(frozen=True)
class Job:
    """What to read and where to write; ``-`` is standard input or output."""

    source: str
    output: str
    params: SamplingParams
    template: Path | None = None
    order: Literal["input", "completion"] = "input"
    limit: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Summary:
    """What a run did. Seconds, tokens, bytes.

    ``prompt_tokens`` counts every sample's prompt as if nothing were shared.
    """

    model: str
    policy: str
    interrupted: bool
    load_seconds: float
    seconds: float
    rows_ok: int
    rows_failed: int
    prompt_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    saved_tokens: int
    output_tokens: int
    tokens_per_second: float
    output_tokens_per_second: float
    steps: int
    preemptions: int
    plan_seconds: float
    model_seconds: float
    sample_seconds: float
    kv_bytes: int
    peak_kv_bytes: int
    peak_rss_bytes: int

    def text(self) -> str:
        """The summary for people."""
        saved = 100 * self.saved_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        share = 100 * self.plan_seconds / self.seconds if self.seconds else 0.0
        rows = [
            ("rows", f"{self.rows_ok} ok, {self.rows_failed} failed"),
            (
                "time",
                f"{format_seconds(self.seconds)} after {format_seconds(self.load_seconds)} "
                f"to load; planning {share:.1f}%",
            ),
            (
                "prompt tokens",
                f"{self.prompt_tokens:,} asked, {self.computed_tokens:,} computed, "
                f"{self.saved_tokens:,} saved by sharing ({saved:.1f}%)",
            ),
            ("output tokens", f"{self.output_tokens:,}"),
            (
                "speed",
                f"{self.tokens_per_second:,.0f} tokens/s, of which output "
                f"{self.output_tokens_per_second:,.0f}",
            ),
            (
                "memory",
                f"KV peak {format_bytes(self.peak_kv_bytes)} of {format_bytes(self.kv_bytes)}; "
                f"process peak {format_bytes(self.peak_rss_bytes)}",
            ),
        ]
        if self.preemptions or self.recomputed_tokens:
            rows.append(
                (
                    "preemption",
                    f"{self.preemptions} times, {self.recomputed_tokens:,} tokens computed again",
                )
            )
        head = "Interrupted" if self.interrupted else "Done"
        return "\n".join([head, *(f"  {name:<14}{text}" for name, text in rows)])


class _Run:
    """The bookkeeping of one run."""

    def __init__(self, llm: Generator, job: Job, write: Callable[[str], object]) -> None:
        self.llm = llm
        self.out = Ordered(write, job.order == "input")
        self.pending: dict[int, tuple[int, Row]] = {}  # request id -> input index, row
        self.total: int | None = None
        self.ok = self.failed = self.tokens = 0
        self.work_known = self.work_done = 0
        self.started = time.perf_counter()

    def requests(self, rows: Iterator[Row | BadRow]) -> Iterator[tuple[Prompt, SamplingParams]]:
        """Feed the good rows to the engine; the bad ones go straight to the output."""
        index = request = 0
        for index, row in enumerate(rows, start=1):
            if isinstance(row, BadRow):
                self.failed += 1
                self.out.put(index - 1, self.line(row, None))
                continue
            self.pending[request] = (index - 1, row)
            self.work_known += _work(row)
            request += 1
            yield row.prompt, row.params
        self.total = index

    def line(self, row: Row | BadRow, output: Any) -> dict[str, Any]:
        return result_line(row, output, self.llm.model, self.llm.tokenizer.token_text)

    def execute(self, rows: Iterator[Row | BadRow], view: View) -> None:
        found = self.llm.generate_iter(
            self.requests(rows), on_step=lambda _: view.show(self.snapshot)
        )
        for output in found:
            index, row = self.pending.pop(output.request_id)
            self.out.put(index, self.line(row, output))
            self.work_done += _work(row)
            if output.error is None:
                self.ok += 1
            else:
                self.failed += 1
            self.tokens += len(output.prompt_token_ids)
            self.tokens += sum(len(sample.token_ids) for sample in output.outputs)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            time.perf_counter() - self.started,
            self.ok + self.failed,
            self.failed,
            self.total,
            self.tokens,
            self.work_done / self.work_known if self.work_known else 0.0,
        )


def _work(row: Row) -> int:
    """Rough tokens of a row, before it is tokenised."""
    text = row.prompt.get("prompt") or row.prompt.get("messages")
    size = len(str(text)) // 4 if text is not None else len(row.prompt["prompt_token_ids"])
    return size + row.params.n * (row.params.max_tokens or 128)


def job_rows(job: Job, model: str, warn: Callable[[str], None]) -> Iterator[Row | BadRow]:
    """The rows of the job's input for ``model``. Raises InputFileError."""
    parser = RowParser(job.params, frozenset({model, Path(model).name}), warn)
    return islice(read_rows(job.source, parser, job.template), job.limit)


def run_job(
    job: Job, llm: Generator, *, load_seconds: float, view: View, warn: Callable[[str], None]
) -> Summary:
    """Run all rows; returns when every result is written.

    An interrupt (Ctrl-C) ends the run with what is finished written. Raises InputFileError if the
    input or the output cannot be used at all.
    """
    interrupted = False
    try:
        with ExitStack() as stack:
            stream = _open_output(job, stack)
            run = _Run(llm, job, stream.write)
            stack.callback(stream.flush)
            stack.callback(run.out.flush_early)
            try:
                with view:
                    run.execute(job_rows(job, llm.model, warn), view)
            except KeyboardInterrupt:
                interrupted = True
    except OSError as error:
        raise InputFileError(
            f"The run stopped, reading {job.source} and writing {job.output}: {error.strerror}.",
            value=job.output,
            action="What is written so far is complete rows, but for the last.",
        ) from error
    return _summarise(run, llm, interrupted, load_seconds)


def _open_output(job: Job, stack: ExitStack) -> IO[str]:
    if job.output == "-":
        return sys.stdout
    path = Path(job.output)
    if path.exists() and path.stat().st_size and not job.overwrite:
        raise InputFileError(
            f"{path} exists already.",
            value=str(path),
            action="Give another name or --overwrite.",
        )
    try:
        return stack.enter_context(open(path, "w", encoding="utf-8", buffering=1))
    except OSError as error:
        raise InputFileError(
            f"{path} cannot be written: {error.strerror}.", value=str(path)
        ) from error


def _summarise(run: _Run, llm: Generator, interrupted: bool, load_seconds: float) -> Summary:
    stats = llm.stats
    seconds = time.perf_counter() - run.started
    return Summary(
        model=llm.model,
        policy=llm.policy,
        interrupted=interrupted,
        load_seconds=load_seconds,
        seconds=seconds,
        rows_ok=run.ok,
        rows_failed=run.failed,
        prompt_tokens=stats.prompt_tokens,
        computed_tokens=stats.computed_tokens,
        recomputed_tokens=stats.recomputed_tokens,
        saved_tokens=stats.saved_tokens,
        output_tokens=stats.output_tokens,
        tokens_per_second=(stats.prompt_tokens + stats.output_tokens) / seconds,
        output_tokens_per_second=stats.output_tokens / seconds,
        steps=stats.steps,
        preemptions=stats.preemptions,
        plan_seconds=stats.plan_seconds,
        model_seconds=stats.model_seconds,
        sample_seconds=stats.sample_seconds,
        kv_bytes=stats.kv_bytes,
        peak_kv_bytes=stats.peak_kv_bytes,
        peak_rss_bytes=peak_rss(),
    )


def peak_rss() -> int:
    """Most resident memory that this process has had, in bytes."""
    try:
        import resource
    except ImportError:  # no such module on Windows
        return int(psutil.Process().memory_info().rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_stats(summary: Summary, path: Path) -> None:
    """The summary as a JSON file."""
    path.write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
