"""What a run did, for people and as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from quire.engine.budget import format_bytes
from quire.jobs.progress import format_seconds


@dataclass(frozen=True)
class Summary:
    """What a run did. Seconds, tokens, bytes.

    ``state`` is ``"done"``, ``"interrupted"`` or ``"cancelled"``. ``rows_ok`` and ``rows_failed``
    are of the whole job, ``rows_before`` of them were finished by earlier runs; ``duplicates`` are
    rows of this run that got the answer of an equal row. ``resumable``: the same command goes on.
    ``prompt_tokens`` counts every sample's prompt as if nothing were shared.
    """

    model: str
    policy: str
    state: str
    resumable: bool
    load_seconds: float
    seconds: float
    rows_ok: int
    rows_failed: int
    rows_before: int
    duplicates: int
    prompt_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    loaded_tokens: int
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

    @property
    def rows(self) -> int:
        """Finished rows of the job."""
        return self.rows_ok + self.rows_failed

    def text(self) -> str:
        """The summary for people."""
        counts = f"{self.rows_ok} ok, {self.rows_failed} failed"
        if self.state == "done" and self.rows == self.rows_before:
            return f"Nothing is left to do: {counts}"
        rows = [("rows", counts)]
        if self.rows_before:
            now = self.rows - self.rows_before
            rows.append(("", f"{self.rows_before} in earlier runs, {now} in this one"))
        if self.duplicates:
            rows.append(
                ("duplicates", f"{self.duplicates} of them, given the answer of an equal row")
            )
        rows += self._work()
        head = self.state.capitalize()
        if self.state != "done" and self.resumable:
            head += ": the same command goes on from here"
        return "\n".join([head, *(f"  {name:<14}{text}" for name, text in rows)])

    def _work(self) -> list[tuple[str, str]]:
        loaded = f"{self.loaded_tokens:,} loaded, " if self.loaded_tokens else ""
        saved = 100 * self.saved_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        share = 100 * self.plan_seconds / self.seconds if self.seconds else 0.0
        rows = [
            (
                "time",
                f"{format_seconds(self.seconds)} after {format_seconds(self.load_seconds)} "
                f"to load; planning {share:.1f}%",
            ),
            (
                "prompt tokens",
                f"{self.prompt_tokens:,} asked, {self.computed_tokens:,} computed, "
                f"{loaded}{self.saved_tokens:,} saved by sharing ({saved:.1f}%)",
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
        return rows


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
