"""Jobs that are killed, or whose disk fills up, lose nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fake_llm import FakeLLM
from quire.decode.params import SamplingParams
from quire.errors import JournalError
from quire.jobs import output, writer
from quire.jobs.job import Job
from quire.jobs.journal import Journal
from quire.jobs.progress import Lines
from quire.jobs.run import run_job
from quire.jobs.summary import Summary

HERE = Path(__file__).parent


@pytest.mark.slow
def test_killed_anywhere_and_gone_on_with(tmp_path: Path) -> None:
    """At statements, writes and fsyncs all over a run; see faults.py for what is compared."""
    done = subprocess.run(
        [sys.executable, str(HERE / "faults.py"), "--points", "60", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={"TMPDIR": str(tmp_path), "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["points"] == 60
    assert found["killed_by"]["event"] > 40  # of up to three for each point, some too late
    assert found["killed_by"]["time"] > 0


def job(folder: Path, rows: int) -> Job:
    source = folder / "in.jsonl"
    lines = [json.dumps({"prompt": f"row {i} " + "x" * 200}) for i in range(rows)]
    source.write_text("".join(f"{line}\n" for line in lines))
    return Job((str(source),), str(folder / "out.jsonl"), SamplingParams())


def run(what: Job, asked: list[str]) -> Summary:
    return run_job(what, lambda: FakeLLM(asked.append), view=Lines(sys.stderr), say=lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("when", [1, 2, 7])
def test_an_output_that_cannot_grow_ends_the_run_and_keeps_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """The disk is full at some write; after that, nothing was lost."""
    monkeypatch.setattr(writer, "COMMIT_ROWS", 5)
    monkeypatch.setattr(writer, "MOST_BYTES", 5000)
    what, asked = replace(job(tmp_path, 60), order="completion"), []
    count = 0
    real = output._write

    def write(file: object, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == when:
            real(file, data[: len(data) // 2])  # type: ignore[arg-type]
            raise OSError(28, "No space left on device")
        real(file, data)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(output, "_write", write)
        with pytest.raises(
            JournalError, match=r"No space left on device\. What is finished is safe"
        ):
            run(what, asked)
    with Journal(Path(f"{what.output}.journal")) as journal:
        assert journal.get("state") == "failed"
        assert "No space left" in journal.get("error")
        committed = [json.loads(line)["custom_id"] for _, line in journal.lines()]
    assert committed
    before = len(asked)
    assert run(what, asked).rows == 60
    again = asked[before:]
    assert not {f"line-{int(prompt.split()[1]) + 1}" for prompt in again} & set(committed)
    assert len(Path(what.output).read_text().splitlines()) == 60


SMALL_DISK = """
import subprocess, sys
sys.path.insert(0, {here!r})
import test_faults as t
from dataclasses import replace
from dataclasses import replace
from pathlib import Path
source, disk = Path({folder!r}), Path({folder!r}) / "disk"
t.writer.COMMIT_ROWS, t.writer.MOST_BYTES = 50, 100_000
what = replace(t.job(source, {rows}), output=str(disk / "out.jsonl"))
mount = ["mount", "-t", "tmpfs", "-o", "size={size}", "tmpfs", str(disk)]
if subprocess.run(mount).returncode:
    sys.exit(77)
try:
    t.run(what, [])
except t.JournalError as error:
    print(error)
subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
asked = []
found = t.run(what, asked)
assert found.rows == {rows} == found.rows_before + len(asked), (found, len(asked))
assert len(Path(what.output).read_text().splitlines()) == {rows}
print("before", found.rows_before)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux namespaces")
@pytest.mark.parametrize("size", ["100k", "400k", "900k"])
def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(tmp_path: Path, size: str) -> None:
    """A file system of its own, that is made larger after the error."""
    (tmp_path / "disk").mkdir()
    code = SMALL_DISK.format(here=str(HERE), folder=str(tmp_path), rows=2000, size=size)
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"no namespace or no mount: {done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "full" in done.stdout or "No space left on device" in done.stdout
    assert ("before 0" in done.stdout) == (size == "100k")
