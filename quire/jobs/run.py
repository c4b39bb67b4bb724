"""A batch job: rows in, results out, nothing held longer than a window of rows, nothing lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

from quire.api.outputs import RequestOutput, Stats
from quire.api.setup import Prompt
from quire.decode.params import SamplingParams
from quire.decode.rng import row_seed
from quire.errors import InputFileError
from quire.jobs.dedupe import Seen, sharing_key
from quire.jobs.job import Job, begin, open_job
from quire.jobs.journal import Finished, Journal
from quire.jobs.output import open_output
from quire.jobs.progress import Snapshot, View
from quire.jobs.recorder import Failure, Recorder
from quire.jobs.records import Record
from quire.jobs.results import copied_line, result_line, to_json
from quire.jobs.resume import unfinished, verify
from quire.jobs.rows import BadRow, Row, RowParser
from quire.jobs.summary import Summary, peak_rss
from quire.jobs.template import Template
from quire.jobs.writer import State, Writer
from quire.schedule.groups import Group

_ERROR_FIELDS = ("code", "field", "message")
MOST_WAITING = 1 << 16  # duplicates that wait for rows which are being computed


class Vocabulary(Protocol):
    """Names tokens."""

    def token_text(self, token: int) -> str:
        """One token as text."""
        ...


class Backend(Protocol):
    """What computes rows: an `LLM`, or something with its face."""

    policy: str

    @property
    def tokenizer(self) -> Vocabulary:
        """Names the tokens of log-probabilities."""
        ...

    @property
    def stats(self) -> Stats:
        """Work done so far."""
        ...

    def generate_iter(
        self,
        requests: Iterable[tuple[Prompt, SamplingParams]],
        *,
        on_step: Callable[[Stats], None] | None = None,
        on_groups: Callable[[list[Group]], None] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Yield each request's output as it finishes, as `LLM.generate_iter` does."""
        ...


class _Asked(NamedTuple):
    """A row that waits for its answer."""

    idx: int
    digest: bytes
    key: bytes | None
    row: Row


class _Run:
    """The bookkeeping of one run. `requests` is read by another thread than `execute`'s."""

    def __init__(
        self, job: Job, journal: Journal, writer: Writer, seen: Seen, recorder: Recorder
    ) -> None:
        self.job = job
        self.recorder = recorder
        self.writer = writer
        self.seen = seen  # used by the reading thread alone
        self.created: int = journal.get("created")
        self.pending: dict[int, _Asked] = {}  # by request id
        self.lock = Lock()  # over what follows
        self.copies: dict[int, list[_Asked]] = {}  # waiting for the row that is computed, by index
        self.waiting = self.duplicates = 0
        self.rows_before = recorder.rows_before = writer.rows
        self.rows_total: int | None = None
        self.tokens = self.work_known = self.work_done = 0
        self.backend: Backend | None = None
        self.stats = Stats()
        self.policy = ""
        self.load_seconds = self.seconds = self.started = 0.0

    def execute(
        self,
        load: Callable[[], AbstractContextManager[Backend]],
        rows: Iterator[tuple[Record, Row | BadRow]],
        view: View,
    ) -> None:
        """Load the backend and run all rows."""
        began = time.perf_counter()
        with load() as backend:
            self.backend = backend
            self.started = time.perf_counter()
            self.load_seconds = self.started - began
            self.recorder.start(backend.stats)

            def on_step(stats: Stats) -> None:
                self.recorder.step(stats)
                self.writer.check()
                view.show(self.snapshot)

            try:
                outputs = backend.generate_iter(
                    self.requests(rows), on_step=on_step, on_groups=self.recorder.groups
                )
                with view, closing(outputs) as found:
                    for output in found:
                        self.finish(output)
            finally:
                self.stats, self.policy = backend.stats, backend.policy
                self.seconds = time.perf_counter() - self.started

    def requests(
        self, rows: Iterator[tuple[Record, Row | BadRow]]
    ) -> Iterator[tuple[Prompt, SamplingParams]]:
        """Feed rows to the engine, but for bad ones and copies of others."""
        request = count = 0
        for record, row in rows:
            count += 1
            if isinstance(row, BadRow):
                self.recorder.row(row.line, row.custom_id, 0, (), row.error)
                line = self.line(row, None)
                self.writer.put(Finished(record.index, record.digest, None, True, line))
                continue
            key = sharing_key(row) if self.job.dedupe else None
            asked = _Asked(record.index, record.digest, key, row)
            if self.is_copy(asked):
                continue
            self.pending[request] = asked
            self.work_known += _work(row)
            request += 1
            yield row.prompt, self.seeded(row.params, record.index)
        self.rows_total = self.recorder.rows_total = self.rows_before + count

    def seeded(self, params: SamplingParams, index: int) -> SamplingParams:
        """A row's tokens must not depend on the run that computes it."""
        if params.greedy or params.seed is not None:
            return params
        return replace(params, seed=row_seed(self.job.seed, index))

    def is_copy(self, asked: _Asked) -> bool:
        """Whether the row gets the answer of an equal one, now or when that is finished."""
        if asked.key is None:
            return False
        first = self.seen.find(asked.key)
        if first is None:
            self.seen.note(asked.key, asked.idx)
            with self.lock:
                self.copies[asked.idx] = []
            return False
        with self.lock:
            waiting = self.copies.get(first)
            if waiting is not None:
                if self.waiting >= MOST_WAITING:
                    return False  # computing it again bounds the memory
                waiting.append(asked._replace(row=replace(asked.row, prompt={})))
                self.waiting += 1
                return True
        line = self.writer.line(first)
        if line is None:
            return False
        self.copy(line, asked)
        return True

    def finish(self, output: RequestOutput) -> None:
        """Take a row's answer, for itself and its copies."""
        asked = self.pending.pop(output.request_id)
        index, digest, key, row = asked
        line = self.line(row, output)
        self.writer.put(Finished(index, digest, key, output.error is not None, line))
        with self.lock:  # after `put`: whoever finds no list here finds the line there
            copies = self.copies.pop(index, [])
            self.waiting -= len(copies)
        for copy in copies:
            self.copy(line, copy)
        self.work_done += _work(row)
        lengths = [len(sample.token_ids) for sample in output.outputs]
        self.tokens += len(output.prompt_token_ids) + sum(lengths)
        self.recorder.row(
            row.line, row.custom_id, len(output.prompt_token_ids), lengths, output.error
        )
        self.writer.check()

    def copy(self, first: str, asked: _Asked) -> None:
        """Give a row the answer of an equal one."""
        line = copied_line(first, asked.row)
        error = line["error"]
        failed = error is not None
        if failed:
            self.recorder.fail(
                Failure(asked.row.line, asked.row.custom_id, *map(error.get, _ERROR_FIELDS))
            )
        else:
            usage = line["response"]["body"]["usage"]
            self.recorder.row(
                asked.row.line,
                asked.row.custom_id,
                usage["prompt_tokens"],
                [usage["completion_tokens"]],
                None,
            )
        self.writer.put(Finished(asked.idx, asked.digest, asked.key, failed, to_json(line)))
        with self.lock:
            self.duplicates += 1

    def line(self, row: Row | BadRow, output: RequestOutput | None) -> str:
        """The row's line of the output."""
        assert self.backend is not None
        text = self.backend.tokenizer.token_text
        return to_json(result_line(row, output, self.job.model, text, self.created))

    def snapshot(self) -> Snapshot:
        """Where the run stands."""
        return Snapshot(
            time.perf_counter() - self.started,
            self.writer.rows,
            self.writer.failed,
            self.rows_total,
            self.tokens,
            self.work_done / self.work_known if self.work_known else 0.0,
            self.recorder.stats.saved_share,
        )


def _work(row: Row) -> int:
    """Rough tokens of a row, before it is tokenised."""
    text = row.prompt.get("prompt") or row.prompt.get("messages")
    size = len(str(text)) // 4 if text is not None else len(row.prompt["prompt_token_ids"])
    return size + row.params.n * (row.params.max_tokens or 128)


def make_parser(job: Job, warn: Callable[[str], None]) -> RowParser:
    """What turns the job's records into rows. Raises InputFileError for a bad template."""
    names = frozenset({job.model, Path(job.model).name})
    template = Template.load(job.template) if job.template is not None else None
    return RowParser(job.params, names, warn, template)


def run_job(
    job: Job,
    load: Callable[[], AbstractContextManager[Backend]],
    *,
    view: View,
    say: Callable[[str], None],
    recorder: Recorder | None = None,
) -> Summary:
    """Run what is left of the job; returns when every result is on disk.

    ``load`` is called when there is something to run. ``recorder`` is told what happens. An
    interrupt (Ctrl-C) ends the run with what is finished kept. Raises InputFileError for an
    input or output that cannot be used at all, JournalError for a job that cannot go on.
    """
    parser = make_parser(job, say)
    try:
        if job.rereadable:
            next(job.records(), None)  # what cannot be read is refused before anything is touched
        with open_job(job) as journal:
            finished, _ = journal.get("counts")
            if finished:
                say(f"{finished} rows are finished already.")
            seen = Seen()
            records: Iterator[Record] = iter(())
            if not job.rereadable or verify(job.records(), journal, job.limit):
                records = unfinished(job.records(), journal, job.limit, seen.note)
            first = next(records, None)
            with closing(
                open_output(job.output, job.order, journal.get("exported"), job.source)
            ) as output:
                begin(job, journal)
                writer = Writer(Journal(journal.path, durable=journal.durable), journal, output)
                writer.start()
                run = _Run(job, journal, writer, seen, recorder or Recorder())
                state: State = "failed"
                try:
                    if first is not None:
                        left = chain([first], records)
                        run.execute(load, ((r, parser.read(r)) for r in left), view)
                    state = "done"
                except KeyboardInterrupt:
                    state = "cancelled" if writer.cancelled else "interrupted"
                finally:
                    writer.finish(state)
            return _summarise(run, state, journal.durable)
    except OSError as error:
        raise InputFileError(
            f"The run stopped, reading {' '.join(job.source)}: {error.strerror}.",
            value=job.source,
            action="What is finished is kept; run the same command again.",
        ) from error


def _summarise(run: _Run, state: State, resumable: bool) -> Summary:
    stats, seconds = run.stats, run.seconds
    writer = run.writer
    return Summary(
        model=run.job.model,
        policy=run.policy,
        state=state,
        resumable=resumable,
        load_seconds=run.load_seconds,
        seconds=seconds,
        rows_ok=writer.rows - writer.failed,
        rows_failed=writer.failed,
        rows_before=run.rows_before,
        duplicates=run.duplicates,
        prompt_tokens=stats.prompt_tokens,
        computed_tokens=stats.computed_tokens,
        recomputed_tokens=stats.recomputed_tokens,
        loaded_tokens=stats.loaded_tokens,
        saved_tokens=stats.saved_tokens,
        output_tokens=stats.output_tokens,
        tokens_per_second=(stats.prompt_tokens + stats.output_tokens) / seconds if seconds else 0.0,
        output_tokens_per_second=stats.output_tokens / seconds if seconds else 0.0,
        steps=stats.steps,
        preemptions=stats.preemptions,
        plan_seconds=stats.plan_seconds,
        model_seconds=stats.model_seconds,
        sample_seconds=stats.sample_seconds,
        kv_bytes=stats.kv_bytes,
        peak_kv_bytes=stats.peak_kv_bytes,
        peak_rss_bytes=peak_rss(),
    )
