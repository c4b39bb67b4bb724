"""``quire jobs``, and jobs that are killed and gone on with, as users see them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from quire.cli.main import app
from quire.jobs.journal import Journal

pytestmark = pytest.mark.slow  # each runs the command as a process


FAST = ["--threads", "1", "--kv-memory", "32MiB", "--max-tokens", "8", "--dtype", "float32"]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "quire", *map(str, words)]


def quire(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=300, check=False, cwd=cwd
    )


def write(path: Path, records: list[object]) -> Path:
    text = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in text))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    """The output, without what the scheduling of a run decides."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for line in found:
        if line["response"]:
            line["response"]["body"]["usage"].pop("prompt_tokens_details")
            line["response"]["body"].pop("created")
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished job: two good rows, a bad one, and one that needs more memory."""
    folder = tmp_path_factory.mktemp("jobs")
    prompts = [{"prompt": "The king"}, "{broken", {"prompt": "word " * 400}, {"prompt": "A ship"}]
    write(folder / "in.jsonl", prompts)
    options = [*FAST, "--kv-memory", "2MiB", "--temperature", "0"]
    done = quire("run", "in.jsonl", "-o", "out.jsonl", *options, cwd=folder)
    assert done.returncode == 1, done.stderr
    assert "2 ok, 2 failed" in done.stderr
    return folder


@pytest.fixture
def inside(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the finished job, as the working folder."""
    monkeypatch.chdir(finished)
    return finished


def jobs(*words: object) -> Result:
    """``quire jobs`` in this process, which is faster."""
    return CliRunner().invoke(app, ["jobs", *map(str, words)])


def test_list_and_show(inside: Path) -> None:
    done = jobs("list")
    assert (done.exit_code, done.stdout) == (0, "out.jsonl: done, 4 rows, 2 failed\n")
    for name in ("out.jsonl", "out.jsonl.journal", inside / "out.jsonl"):
        done = jobs("show", name)
        assert done.exit_code == 0, done.stderr
        assert "4 rows, 2 of them failed" in done.stdout
        assert "run in.jsonl -o out.jsonl" in done.stdout
        assert "temperature" in done.stdout
    bad = inside / "bad.jsonl.journal"
    bad.write_text("garbage")
    assert "bad.jsonl: The journal" in jobs("list", inside).stdout
    bad.unlink()
    assert "there are no journals" in jobs("list", "/").stderr


def test_export(inside: Path) -> None:
    whole = (inside / "out.jsonl").read_text()
    assert jobs("export", "out.jsonl").stdout == whole
    done = jobs("export", "out.jsonl", "-o", "copy.jsonl")
    assert (done.exit_code, done.stderr) == (0, "4 rows written to copy.jsonl\n")
    assert (inside / "copy.jsonl").read_text() == whole
    again = jobs("export", "out.jsonl", "-o", "copy.jsonl")
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_export_of_a_damaged_journal_gives_what_is_left(inside: Path) -> None:
    data = (inside / "out.jsonl.journal").read_bytes()
    (inside / "cut.jsonl.journal").write_bytes(data[: len(data) - 4096])
    done = jobs("export", "cut.jsonl")
    assert done.exit_code == 1
    assert "is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    (inside / "cut.jsonl.journal").unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "nothing.jsonl"], "There is no job nothing.jsonl"),
        (["cancel", "out.jsonl"], "is not running"),
        (["show", "in.jsonl"], "is damaged: file is not a database"),
    ],
)
def test_what_cannot_be_done_is_said(inside: Path, words: list[str], message: str) -> None:
    assert inside.is_dir()
    done = jobs(*words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_retry_failed_runs_them_again_and_them_alone(finished: Path) -> None:
    before = rows(finished / "out.jsonl")
    source = (finished / "in.jsonl").read_text()
    done = quire("jobs", "retry-failed", finished / "out.jsonl", cwd=Path("/"))
    assert done.returncode == 1, done.stderr
    assert "2 failed rows to run again" in done.stderr
    assert "2 in earlier runs, 2 in this one" in done.stderr
    assert rows(finished / "out.jsonl") == before
    # Failed rows may be mended in the input once they are forgotten.
    (finished / "in.jsonl").write_text(source.replace("{broken", '{"prompt": "mended"}'))
    done = quire("jobs", "retry-failed", "out.jsonl", cwd=finished)
    assert "3 ok, 1 failed" in done.stderr, done.stderr
    assert [line["error"] is None for line in rows(finished / "out.jsonl")] == [
        True, True, False, True,
    ]  # fmt: skip


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*words), stderr=subprocess.PIPE, text=True, cwd=folder, env=dict(os.environ)
    )


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def counted(folder: Path) -> int:
    """Finished rows of the job in ``folder``."""
    path = folder / "out.jsonl.journal"
    if not path.exists():
        return 0
    with Journal(path) as journal:
        return 0 if journal.blank else int(journal.get("counts")[0])


LONG = [
    {"prompt": f"Chapter {i % 700}", "max_tokens": 4 + i % 30, "temperature": 0.9 * (i % 3 > 0)}
    for i in range(2000)
]


@pytest.mark.slow
def test_a_running_job_is_shown_refused_to_others_and_cancelled(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": f"No {i}", "max_tokens": 90} for i in range(20000)])
    words = ["run", "in.jsonl", "-o", "out.jsonl", "--order", "completion", *FAST]
    process = start(tmp_path, *words)
    wait_until(lambda: counted(tmp_path) > 0)
    assert "state        running" in quire("jobs", "show", "out.jsonl", cwd=tmp_path).stdout
    other = quire(*words, cwd=tmp_path)
    assert other.returncode == 2
    assert f"Another run has this job: process {process.pid}" in other.stderr
    partial = quire("jobs", "export", "out.jsonl", cwd=tmp_path).stdout.splitlines()
    assert len(partial) > 0
    assert quire("jobs", "cancel", "out.jsonl", cwd=tmp_path).returncode == 0
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Cancelled: the same command goes on from here" in errors
    assert "out.jsonl: cancelled" in quire("jobs", "list", cwd=tmp_path).stdout
    assert len(partial) <= len(rows(tmp_path / "out.jsonl")) == counted(tmp_path) < 20000


@pytest.mark.slow
@pytest.mark.parametrize("order", ["input", "completion"])
def test_killed_jobs_go_on_to_the_same_results(tmp_path: Path, order: str) -> None:
    """Killed three times at random; texts equal those of a run that was left alone."""
    write(tmp_path / "in.jsonl", LONG)
    words = ["run", "in.jsonl", "--order", order, "--stats", "stats.json", *FAST]
    assert quire(*words, "-o", "whole.jsonl", cwd=tmp_path).returncode == 0
    output = sum(
        row["response"]["body"]["usage"]["completion_tokens"]
        for row in rows(tmp_path / "whole.jsonl")
    )
    chance = random.Random(order)
    for _ in range(3):
        before = counted(tmp_path)
        process = start(tmp_path, *words, "-o", "out.jsonl")
        wait_until(lambda: counted(tmp_path) > before)  # noqa: B023
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert "stopped" in quire("jobs", "list", cwd=tmp_path).stdout
    done = quire(*words, "-o", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, whole = rows(tmp_path / "out.jsonl"), rows(tmp_path / "whole.jsonl")
    if order == "completion":
        found.sort(key=lambda row: row["id"])
        whole.sort(key=lambda row: row["id"])
    assert found == whole
    last = json.loads((tmp_path / "stats.json").read_text())
    assert last["rows_before"] > 0
    assert last["output_tokens"] < output
