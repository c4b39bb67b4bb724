"""Progress of a run: one stream of snapshots, shown as a bar, as log lines, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

LINE_SECONDS = 10.0
BAR_SECONDS = 0.1


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands. ``rows_total`` is None while the input is still being read.

    ``tokens``: prompt and output tokens of what is finished. ``share``: the part of the work read
    so far that is finished, by estimated tokens, 0 to 1; ``saved`` the part of the prompt tokens so
    far that sharing saved, 0 to 1.
    """

    seconds: float
    rows_done: int
    rows_failed: int
    rows_total: int | None
    tokens: int
    share: float
    saved: float

    @property
    def rate(self) -> float:
        """Tokens a second, prompt tokens served from sharing included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds to the end, by tokens; None while it cannot be told."""
        if self.rows_total is None or self.share <= 0:
            return None
        return self.seconds * (1 - self.share) / self.share

    def text(self) -> str:
        """The snapshot in one line."""
        total = f"/{self.rows_total}" if self.rows_total is not None else ""
        left = self.remaining
        ending = f", about {format_seconds(left)} left" if left is not None else ""
        failed = f", {self.rows_failed} failed" if self.rows_failed else ""
        saved = f", {100 * self.saved:.0f}% of prompts saved" if self.saved else ""
        speed = f"{self.rate:,.0f} tokens/s"
        return f"{self.rows_done}{total} rows{failed}, {speed}{saved}{ending}"


def format_seconds(seconds: float) -> str:
    """``1:02:03`` or ``2:03`` or ``4.5 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class View(Protocol):
    """Shows snapshots."""

    def show(self, snapshot: Callable[[], Snapshot]) -> None:
        """Called often; the view decides whether it is time to look."""
        ...

    def __enter__(self) -> View:
        """Start."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Clean up."""
        ...


class Lines:
    """A plain line every ``seconds``, for logs."""

    def __init__(self, stream: IO[str], seconds: float = LINE_SECONDS) -> None:
        self._stream = stream
        self._seconds = seconds
        self._last = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, snapshot: Callable[[], Snapshot]) -> None:
        """Print a line if it is time."""
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            print(snapshot().text(), file=self._stream, flush=True)


class Bar:
    """A live bar on a terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            console=Console(file=stream),
            transient=True,
        )
        self._task = self._progress.add_task("planning", total=None)
        self._last = 0.0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, snapshot: Callable[[], Snapshot]) -> None:
        """Move the bar if it is time."""
        if time.monotonic() - self._last < BAR_SECONDS:
            return
        self._last = time.monotonic()
        now = snapshot()
        self._progress.update(
            self._task,
            description=now.text(),
            completed=now.share,
            total=1.0 if now.rows_total is not None else None,
        )
