"""JSON lines with the documented fields; the same things as text for people."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
from runs import BUDGET, SETTINGS, make_run, summarise

from quire.errors import InputFileError
from quire.jobs.dry_run import DryRun
from quire.jobs.log import JsonLog, Log, TextLog
from quire.jobs.progress import Snapshot
from quire.jobs.recorder import Failure

DOCS = Path(__file__).parents[2] / "docs" / "report.md"
NOW = Snapshot(10.0, 30, 2, 120, 5000, 0.25, 0.4)
PLAN = DryRun(9, 1, 100, 60, 70, 80, 1000, 10**6, 0.5, 12.0)
FAILED = Failure(7, "row \ud800 7", "InvalidRequestError", "prompt", "It is\nempty.")


def documented() -> dict[str, set[str]]:
    """Events and their fields, from the page."""
    text = DOCS.read_text(encoding="utf-8").split("\n## ")[2]
    assert text.startswith("JSON lines")
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|$", text, re.MULTILINE)
    assert rows
    return {event: set(re.findall(r"`(\w+)`", fields)) for event, fields in rows}


def everything(log: Log) -> None:
    log.start({**SETTINGS, "report": Path("x.html")}, BUDGET)
    log.warn("The field 'x' is unknown.")
    with log.view() as view:
        view.show(lambda: NOW)
    log.failed(FAILED)
    log.plan(PLAN)
    log.summary(summarise(*make_run(100)))
    log.error(InputFileError("There is no such file.", action="Give another."))


def test_json_lines_have_the_documented_fields() -> None:
    stream = io.StringIO()
    everything(JsonLog(stream, 0.0))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    events = [line.pop("event") for line in lines]
    assert events == ["start", "warning", "progress", "row_failed", "plan", "summary", "error"]
    times = [datetime.fromisoformat(line.pop("time")) for line in lines]
    assert times == sorted(times)
    assert all(time.utcoffset() is not None for time in times)
    assert {e: set(line) for e, line in zip(events, lines, strict=True)} == documented()
    found = dict(zip(events, lines, strict=True))
    assert found["start"]["settings"] == {**SETTINGS, "report": "x.html"}
    assert found["start"]["memory"]["kv_bytes"] == BUDGET.kv
    assert found["progress"]["tokens_per_second"] == 500
    assert found["progress"]["remaining_seconds"] == 30
    assert found["progress"]["saved_share"] == 0.4
    assert found["row_failed"] == asdict(FAILED)
    assert found["plan"] == asdict(PLAN)
    assert found["summary"] == asdict(summarise(*make_run(100)))
    assert found["error"] == {
        "code": "InputFileError",
        "message": "There is no such file. Give another.",
    }


def test_text_says_the_same() -> None:
    stream = io.StringIO()
    everything(TextLog(stream, 0.0))
    text = stream.getvalue()
    for words in (
        "Memory\n  weights",
        "The field 'x' is unknown.",
        "30/120 rows, 2 failed, 500 tokens/s, 40% of prompts saved, about 30.0 s left",
        "9 good, 1 bad",
        "Done",
        "quire: There is no such file.",
    ):
        assert words in text


@pytest.mark.parametrize("kind", [JsonLog, TextLog])
def test_progress_is_not_told_too_often(kind: type[JsonLog | TextLog]) -> None:
    stream = io.StringIO()
    asked = 0

    def snapshot() -> Snapshot:
        nonlocal asked
        asked += 1
        return NOW

    with kind(stream, 3600.0).view() as view:
        for _ in range(100):
            view.show(snapshot)
    assert stream.getvalue() == ""
    assert asked == 0
