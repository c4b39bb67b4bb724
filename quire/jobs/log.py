"""What a run tells its user on standard error: text for people, or JSON lines for programs.

The events and their fields are documented in docs/report.md; tests hold the page and this file
together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import IO, Protocol

from quire.engine.budget import Budget
from quire.errors import QuireError
from quire.jobs.dry_run import DryRun
from quire.jobs.progress import Bar, Lines, Snapshot, View
from quire.jobs.recorder import Failure
from quire.jobs.summary import Summary


class Log(Protocol):
    """Receives what happens in a run."""

    def start(self, settings: Mapping[str, object], budget: Budget) -> None:
        """The memory is shared out; weights are loaded next."""
        ...

    def view(self) -> View:
        """What shows the progress."""
        ...

    def failed(self, failure: Failure) -> None:
        """A row failed."""
        ...

    def warn(self, text: str) -> None:
        """Something is odd, and the run goes on."""
        ...

    def plan(self, plan: DryRun) -> None:
        """A dry run ended."""
        ...

    def summary(self, summary: Summary) -> None:
        """The run ended."""
        ...

    def error(self, error: QuireError) -> None:
        """Nothing can be run."""
        ...


class TextLog:
    """Text, with a bar on a terminal and a line every ``seconds`` elsewhere."""

    def __init__(self, stream: IO[str], seconds: float) -> None:
        self._stream = stream
        self._seconds = seconds

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def start(self, settings: Mapping[str, object], budget: Budget) -> None:  # noqa: ARG002
        """Print the memory table."""
        self._say(f"Memory\n{budget.table()}")

    def view(self) -> View:
        """A bar or lines."""
        return Bar(self._stream) if self._stream.isatty() else Lines(self._stream, self._seconds)

    def failed(self, failure: Failure) -> None:
        """Nothing: the output has the row's error, the summary the number."""

    def warn(self, text: str) -> None:
        """Print it."""
        self._say(text)

    def plan(self, plan: DryRun) -> None:
        """Print it."""
        self._say(plan.text())

    def summary(self, summary: Summary) -> None:
        """Print it."""
        self._say(summary.text())

    def error(self, error: QuireError) -> None:
        """Print it."""
        self._say(f"quire: {error}")


class JsonLog:
    """One JSON object a line; progress every ``seconds``.

    Every line has ``event`` and ``time`` (UTC, ISO 8601); the other fields depend on the event.
    """

    def __init__(self, stream: IO[str], seconds: float) -> None:
        self._stream = stream
        self._seconds = seconds

    def event(self, name: str, fields: Mapping[str, object]) -> None:
        """Write a line."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"event": name, "time": now, **fields}, default=str)
        self._stream.write(line + "\n")  # at once: bad rows come from another thread
        self._stream.flush()

    def start(self, settings: Mapping[str, object], budget: Budget) -> None:
        """Settings and memory as data."""
        memory = {f"{name}_bytes": value for name, value in asdict(budget).items()}
        self.event("start", {"settings": settings, "memory": memory})

    def view(self) -> View:
        """Progress as events."""
        return _JsonView(self, self._seconds)

    def failed(self, failure: Failure) -> None:
        """A line for each failed row."""
        self.event("row_failed", asdict(failure))

    def warn(self, text: str) -> None:
        """A warning."""
        self.event("warning", {"message": text})

    def plan(self, plan: DryRun) -> None:
        """The dry run's figures."""
        self.event("plan", asdict(plan))

    def summary(self, summary: Summary) -> None:
        """The same figures as ``--stats`` writes."""
        self.event("summary", asdict(summary))

    def error(self, error: QuireError) -> None:
        """Why nothing can be run."""
        self.event("error", {"code": type(error).__name__, "message": str(error)})


class _JsonView:
    """Writes a progress event every few seconds."""

    def __init__(self, log: JsonLog, seconds: float) -> None:
        self._log = log
        self._seconds = seconds
        self._last = time.monotonic()

    def __enter__(self) -> _JsonView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, snapshot: Callable[[], Snapshot]) -> None:
        """Write a line if it is time."""
        if time.monotonic() - self._last < self._seconds:
            return
        self._last = time.monotonic()
        now = snapshot()
        self._log.event(
            "progress",
            {
                "seconds": now.seconds,
                "rows_done": now.rows_done,
                "rows_failed": now.rows_failed,
                "rows_total": now.rows_total,
                "tokens": now.tokens,
                "tokens_per_second": now.rate,
                "work_share": now.share,
                "saved_share": now.saved,
                "remaining_seconds": now.remaining,
            },
        )
