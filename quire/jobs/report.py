"""The report of a run: one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from quire.engine.budget import Budget, format_bytes
from quire.errors import InputFileError, QuireError
from quire.jobs.charts import Chart, Series, compact_bytes, histogram_chart, time_chart
from quire.jobs.progress import format_seconds
from quire.jobs.recorder import Cause, Histogram, Recorder
from quire.jobs.summary import Summary

LARGEST_GROUPS = 20
LONGEST = 240  # characters of a text from outside


@dataclass(frozen=True)
class Card:
    """A figure at the top of the page."""

    label: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True)
class Part:
    """A piece of a bar; ``share`` of 1."""

    name: str
    colour: str
    text: str
    share: float


def check_writable(path: Path) -> None:
    """Raise InputFileError if ``path`` can hold no report, before any work is done."""
    target = path if path.exists() else path.parent
    if path.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise InputFileError(
            f"The report {path} cannot be written.",
            value=str(path),
            action="Give a file in a folder that exists and can be written.",
        )


def write_report(path: Path, page: str) -> None:
    """Write the page. Raises QuireError; the results are complete by then."""
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise QuireError(
            f"The report {path} could not be written: {error.strerror}.",
            value=str(path),
            action="The results are complete all the same.",
        ) from error


def make_report(
    summary: Summary,
    recorder: Recorder,
    *,
    settings: Mapping[str, object],
    budget: Budget,
    machine: Sequence[tuple[str, str]],
    decode: Callable[[Sequence[int]], str],
) -> str:
    """The page.

    ``settings``: the flags; its "source" names the job. ``machine``: what it ran on. ``decode``
    gives the text of token ids.
    """
    folder = files("quire.jobs") / "page"
    script = (folder / "page.js").read_text("utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "page.html").read_text("utf-8"))
    steps = bool(recorder.timeline.bins)
    causes = recorder.failures.causes()
    return template.render(
        # The browser runs this script and no other, whatever a prompt holds.
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(digest).decode(),
        style=Markup((folder / "page.css").read_text("utf-8")),
        title=readable(Path(str(settings["source"])).name) or "standard input",
        subtitle=_subtitle(summary, recorder),
        status=_status(summary),
        cards=_cards(summary, recorder),
        causes=[_cause(cause, recorder.failures.count) for cause in causes],
        throughput=_throughput(recorder) if steps else None,
        batch=_batch(recorder) if steps else None,
        memory=_memory(recorder) if steps else None,
        saving=_saving(summary) if summary.prompt_tokens else None,
        groups=_groups(recorder, decode),
        lengths=_lengths(recorder),
        times=_times(summary) if steps else None,
        times_note=f"{format_seconds(summary.seconds)} of running, after "
        f"{format_seconds(summary.load_seconds)} to load the model.",
        settings=[(name, readable(_setting(value))) for name, value in settings.items()],
        budget=[
            (n, ", ".join(filter(None, (format_bytes(size), note))))
            for n, size, note in budget.parts()
        ],
        machine=machine,
        figures=[(name, readable(_figure(value))) for name, value in asdict(summary).items()],
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def readable(text: str, longest: int = LONGEST) -> str:
    """``text`` on one line, without invisible characters, at most ``longest`` characters."""
    text = text[: 4 * longest].replace("\n", " ↵ ")
    kept = "".join(
        c if c.isprintable() else " "
        for c in text
        if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs")
    )
    line = " ".join(kept.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _setting(value: object) -> str:
    if value is None or value == []:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _figure(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)


def _status(summary: Summary) -> tuple[str, str]:
    if summary.state != "done":
        return "stopped", summary.state.capitalize()
    if summary.rows_failed:
        rows = "row" if summary.rows_failed == 1 else "rows"
        return "bad", f"Done, {summary.rows_failed:,} {rows} failed"
    return "good", "Done" if summary.rows_ok else "Done, no rows"


def _subtitle(summary: Summary, recorder: Recorder) -> str:
    text = f"{readable(summary.model)}, {summary.policy} policy"
    if recorder.rows_before:
        text += (
            f". The figures are of this run; {recorder.rows_before:,} rows were finished before it."
        )
    return text


def _cards(summary: Summary, recorder: Recorder) -> list[Card]:
    saved = summary.saved_tokens / summary.prompt_tokens if summary.prompt_tokens else 0.0
    before = f", {recorder.rows_before:,} before" if recorder.rows_before else ""
    outputs = recorder.output_lengths
    mean = f"{outputs.sum / outputs.count:,.0f} a sample on average" if outputs.count else "none"
    share = summary.peak_kv_bytes / summary.kv_bytes if summary.kv_bytes else 0.0
    time, _, unit = format_seconds(summary.seconds).partition(" ")
    kv, kv_unit = format_bytes(summary.peak_kv_bytes).split()
    process, process_unit = format_bytes(summary.peak_rss_bytes).split()
    return [
        Card(
            "Rows",
            f"{summary.rows_ok + summary.rows_failed:,}",
            "",
            f"{summary.rows_ok:,} ok, {summary.rows_failed:,} failed{before}",
        ),
        Card("Time", time, unit, f"after {format_seconds(summary.load_seconds)} to load"),
        Card(
            "Speed",
            f"{summary.tokens_per_second:,.0f}",
            "tokens/s",
            f"{summary.output_tokens_per_second:,.0f} of them output",
        ),
        Card(
            "Saved by sharing",
            f"{100 * saved:.1f}%",
            "",
            f"{summary.saved_tokens:,} of {summary.prompt_tokens:,} prompt tokens",
        ),
        Card("Output tokens", f"{summary.output_tokens:,}", "", mean),
        Card("KV peak", kv, kv_unit, f"{100 * share:.1f}% of {format_bytes(summary.kv_bytes)}"),
        Card("Process peak", process, process_unit, "resident memory"),
        Card(
            "Preemptions",
            f"{summary.preemptions:,}",
            "",
            f"{summary.recomputed_tokens:,} tokens computed again",
        ),
    ]


def _cause(cause: Cause, failed: int) -> dict[str, Any]:
    examples = [
        {
            "line": e.line,
            "custom_id": readable(e.custom_id or "", 60),
            "message": readable(e.message),
        }
        for e in cause.examples
    ]
    name = f"{cause.code} ({cause.field})" if cause.field else cause.code
    return {
        "name": readable(name),
        "count": cause.count,
        "share": cause.count / failed,
        "examples": examples,
    }


def _edges(recorder: Recorder) -> list[float]:
    bins = recorder.timeline.bins
    return [bins[0].start, *(b.end for b in bins)]


def _throughput(recorder: Recorder) -> Chart:
    bins = recorder.timeline.bins
    seconds = [max(b.end - b.start, 1e-6) for b in bins]

    def rate(tokens: Callable[[Any], int]) -> list[float]:
        return [tokens(b) / s for b, s in zip(bins, seconds, strict=True)]

    return time_chart(
        "Tokens a second over time",
        _edges(recorder),
        [
            Series("delivered: prompt and output", "pale", rate(lambda b: b.prompt + b.output)),
            Series("computed", "blue", rate(lambda b: b.prefill + b.decode)),
        ],
        extra=[Series("output", "", rate(lambda b: b.output))],
    )


def _batch(recorder: Recorder) -> Chart:
    bins = recorder.timeline.bins
    return time_chart(
        "Tokens of a step over time",
        _edges(recorder),
        [
            Series("prefill", "blue", [b.prefill / max(b.steps, 1) for b in bins]),
            Series("decode", "amber", [b.decode / max(b.steps, 1) for b in bins]),
        ],
        stacked=True,
        extra=[
            Series("sequences running", "", [b.running for b in bins]),
            Series("steps", "", [b.steps for b in bins]),
        ],
    )


def _memory(recorder: Recorder) -> Chart:
    return time_chart(
        "KV memory in use over time",
        _edges(recorder),
        [Series("used", "green", [b.kv_bytes for b in recorder.timeline.bins])],
        compact_bytes,
        in_bytes=True,
        limit=("limit", recorder.stats.kv_bytes),
    )


def _saving(summary: Summary) -> list[Part]:
    asked = max(summary.prompt_tokens, 1)
    saved, loaded = summary.saved_tokens, summary.loaded_tokens
    rest = summary.prompt_tokens - saved - loaded
    parts = [Part("computed", "blue", f"{rest:,}", rest / asked)]
    if loaded:
        parts.append(Part("loaded", "green", f"{loaded:,}", loaded / asked))
    return [*parts, Part("saved", "pale", f"{saved:,}", saved / asked)]


def _groups(recorder: Recorder, decode: Callable[[Sequence[int]], str]) -> list[dict[str, Any]]:
    largest = recorder.shared.largest(LARGEST_GROUPS)
    found = []
    for group in largest:
        text = readable(decode(group.head), LONGEST - 2)
        more = " …" if group.end - group.start > len(group.head) else ""
        found.append(
            {
                "text": text + more,
                "start": group.start,
                "end": group.end,
                "readers": group.readers,
                "saved": group.saved,
                "share": group.saved / largest[0].saved,
            }
        )
    return found


def _lengths(recorder: Recorder) -> list[tuple[str, str, str, Chart]]:
    parts = [
        ("prompts", "Prompt lengths", "rows", "blue", recorder.prompt_lengths),
        ("outputs", "Output lengths", "samples", "amber", recorder.output_lengths),
    ]
    return [
        (
            id,
            heading,
            _spread(data),
            histogram_chart(heading, "tokens", what, colour, data),
        )
        for id, heading, what, colour, data in parts
        if data.count
    ]


def _spread(data: Histogram) -> str:
    return (
        f"Tokens. Half are up to {data.quantile(0.5):,}, 99% up to {data.quantile(0.99):,}, "
        f"all up to {data.largest:,}."
    )


def _times(summary: Summary) -> list[Part]:
    known = [
        ("model", "blue", summary.model_seconds),
        ("sampling", "amber", summary.sample_seconds),
        ("planning", "green", summary.plan_seconds),
    ]
    rest = max(0.0, summary.seconds - sum(seconds for _, _, seconds in known))
    known.append(("reading, writing, waiting", "grey", rest))
    total = sum(seconds for _, _, seconds in known) or 1.0
    return [
        Part(name, colour, format_seconds(seconds), seconds / total)
        for name, colour, seconds in known
    ]
