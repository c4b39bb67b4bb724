"""What ``quire run`` shows of a run: JSON lines, metrics, a report."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytestmark = pytest.mark.slow  # each runs the command as a process


FAST = ["--threads", "1", "--kv-memory", "32MiB", "--max-tokens", "8", "--temperature", "0"]
SHARED = "The king sat by the window and looked at the garden, as he did on every day. " * 3
WITHOUT = (
    "import sys; sys.modules['prometheus_client'] = None; from quire.cli.main import app; app()"
)


def quire(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quire", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], object]:
    """A job with bad rows, watched in every way; its folder and log."""
    folder = tmp_path_factory.mktemp("job")
    rows = [json.dumps({"prompt": f"{SHARED}Then {i}", "mood": 1}) for i in range(9)]
    rows += ["{broken", '{"custom_id": "<b>x</b>", "prompt": ""}']
    (folder / "in.jsonl").write_text("\n".join(rows))
    done = quire(
        "run", folder / "in.jsonl", "-o", folder / "out.jsonl", *FAST, "--window", "4",
        "--report", folder / "report.html", "--stats", folder / "stats.json",
        "--log-json", "--log-every", "0",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    return folder, [json.loads(line) for line in done.stderr.splitlines()], done


def test_every_line_of_the_log_is_an_event(job: tuple[Path, list[dict], object]) -> None:
    folder, log, _ = job
    events = [line["event"] for line in log]
    assert events[0] == "start"
    assert events[-1] == "summary"
    assert set(events) == {"start", "warning", "progress", "row_failed", "summary"}
    assert log[0]["settings"]["max_tokens"] == 8
    assert log[0]["memory"]["kv_bytes"] == 32 << 20
    assert [line["line"] for line in log if line["event"] == "row_failed"] == [10, 11]
    progress = [line for line in log if line["event"] == "progress"]
    assert len(progress) == log[-1]["steps"]
    assert progress[-1]["rows_done"] == progress[-1]["rows_total"] == 11
    assert progress[-1]["saved_share"] > 0.3
    assert all(0 <= line["saved_share"] <= 1 for line in progress)
    stats = json.loads((folder / "stats.json").read_text())
    assert {k: v for k, v in log[-1].items() if k not in ("event", "time")} == stats


def test_the_report_has_the_figures_of_the_run(job: tuple[Path, list[dict], object]) -> None:
    folder, log, _ = job
    page = (folder / "report.html").read_text()
    for name in ("prompt_tokens", "computed_tokens", "saved_tokens", "output_tokens", "steps"):
        assert f'<dd data-figure="{name}">{log[-1][name]:,}</dd>' in page
    assert "Done, 2 rows failed" in page
    assert "The king sat by the window" in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<b>x</b>" not in page


def test_saved_tokens_are_those_of_the_groups(job: tuple[Path, list[dict], object]) -> None:
    """Every prompt starts alike: the largest group saves all but what windows compute anew."""
    folder, log, _ = job
    page = (folder / "report.html").read_text()
    saved = log[-1]["saved_tokens"]
    assert f'data-label="Tokens saved">{saved:,}<' in page


def test_an_unwritable_report_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}')
    out = tmp_path / "out.jsonl"
    report = tmp_path / "none" / "report.html"
    done = quire("run", tmp_path / "in.jsonl", "-o", out, "--log-json", "--report", report, *FAST)
    assert done.returncode == 2
    (line,) = [json.loads(text) for text in done.stderr.splitlines()]
    assert (line["event"], line["code"]) == ("error", "InputFileError")
    assert not out.exists()


def test_dry_run_as_json(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n{')
    done = quire("run", tmp_path / "in.jsonl", "--dry-run", "--log-json", *FAST)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in log] == ["start", "plan"]
    assert (log[1]["rows"], log[1]["bad_rows"]) == (1, 1)


def test_metrics_are_served_while_it_runs() -> None:
    """The job waits for its input until the metrics have been read."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "quire", "run", "-", *FAST, "--metrics-port", str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        text = ""
        deadline = time.monotonic() + 120
        while not text and process.poll() is None and time.monotonic() < deadline:
            try:
                with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    text = answer.read().decode()
            except URLError:
                time.sleep(0.1)
        out, errors = process.communicate('{"prompt": "x"}\n', timeout=120)
    assert process.returncode == 0, errors
    assert 'quire_rows_finished_total{result="ok"} 0.0' in text
    assert "# TYPE quire_step_duration_seconds histogram" in text
    assert json.loads(out)["error"] is None


def test_metrics_without_the_extra_say_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "run", "x.jsonl", "--metrics-port", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'quire[metrics]'" in done.stderr
    assert "Traceback" not in done.stderr
