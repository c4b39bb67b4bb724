"""Real processes: the same outputs, deaths in mid-flight, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.errors import CheckpointError, InvalidRequestError, MemoryBudgetError, WorkerDiedError
from quire.fleet import processes
from quire.fleet.fleet import Fleet
from quire.fleet.processes import on_this_machine
from tests.fleet.conftest import OPTIONS
from tests.fleet.test_fleet import rows, tokens

# A worker that dies when it is given a certain prompt to run.
POISONED = """
import os, signal
from quire.engine.world import World
apply = World.apply
def deadly(self, plan):
    if any(seq.prompt.tolist()[-3:] == [300, 301, 302] for seq in plan.admit):
        os.kill(os.getpid(), signal.SIGKILL)
    return apply(self, plan)
World.apply = deadly
"""


def pids(fleet: Fleet) -> list[int]:
    transport = fleet._transport
    assert isinstance(transport, processes.Processes)
    return [child._process.pid for child in transport._children]


def wait_for_end(gone: list[int], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while any(map(psutil.pid_exists, gone)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_processes_changes_nothing(tiny: Path, workers: int) -> None:
    with LLM(tiny, **OPTIONS) as llm:
        expected = tokens(list(llm.generate_iter(rows(100))))
    with on_this_machine(tiny, workers=workers, **OPTIONS) as fleet:
        started = pids(fleet)
        assert tokens(list(fleet.generate_iter(rows(100)))) == expected
        assert {len(psutil.Process(pid).cpu_affinity()) for pid in started} == {
            max(1, len(os.sched_getaffinity(0)) // workers)
        }
    wait_for_end(started)


@pytest.mark.slow
def test_killing_workers_changes_nothing(tiny: Path) -> None:
    def long_rows() -> Iterator[tuple[str, SamplingParams]]:
        for i in range(200):
            params = SamplingParams(max_tokens=80, ignore_eos=True, n=1 + i % 2)
            yield f"A tale of {i % 9} and {i}", params

    with LLM(tiny, **OPTIONS) as llm:
        expected = tokens(list(llm.generate_iter(long_rows())))
    rng = random.Random(0)
    words: list[str] = []
    with on_this_machine(tiny, workers=2, warn=words.append, **OPTIONS) as fleet:
        found, killed = [], 0
        for output in fleet.generate_iter(long_rows()):
            found.append(output)
            if killed < 2 and len(found) > 40 * (killed + 1):
                os.kill(rng.choice(pids(fleet)), signal.SIGKILL)
                killed += 1
    assert tokens(found) == expected
    assert killed == 2
    assert 1 <= len(words) <= killed  # the second may have met a process that was dead already
    assert "killed by SIGKILL. It is started again." in words[0]


@pytest.mark.slow
def test_a_request_that_kills_its_worker_becomes_an_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, tail = processes.CHILD.split("serve(pipe)")
    monkeypatch.setattr(processes, "CHILD", head + POISONED + "serve(pipe)" + tail)
    requests = list(rows(100))
    poison = {"prompt_token_ids": [5, 6, 300, 301, 302]}
    with LLM(tiny, **OPTIONS) as llm:
        expected = tokens(list(llm.generate_iter(requests)))
    requests.insert(40, (poison, SamplingParams(max_tokens=4, seed=1)))
    # Seeds follow the place in the input: the sampled rows behind the poison get other ones.
    with on_this_machine(tiny, workers=2, **OPTIONS) as fleet:
        found = sorted(fleet.generate_iter(requests), key=lambda o: o.request_id)
    assert isinstance(found[40].error, WorkerDiedError)
    assert "SIGKILL" in str(found[40].error)
    assert [type(o.error) for o in found[:40]] == [kind for kind, _, _ in expected[:40]]
    assert [o.prompt_token_ids for o in found[41:]] == [ids for _, ids, _ in expected[40:]]
    assert all(o.outputs or o.error for o in found)
    assert [[s.token_ids for s in o.outputs] for o in found[:40]] == [
        [ids for ids, _ in samples] for _, _, samples in expected[:40]
    ]


@pytest.mark.slow
def test_what_no_worker_can_load_is_said_once(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    words: list[str] = []
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        on_this_machine(folder, workers=2, warn=words.append, **OPTIONS)
    assert words == []
    assert not psutil.Process().children()


def test_unusable_options(tiny: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="divided among 3 workers"):
        on_this_machine(tiny, workers=3, memory="900MiB")
    with pytest.raises(MemoryBudgetError, match="Ask for at most --memory"):
        on_this_machine(tiny, workers=2, memory="9000GiB")
    with pytest.raises(InvalidRequestError, match="Give a number from 1"):
        on_this_machine(tiny, workers="some")
    with pytest.raises(TypeError, match="chunks"):
        on_this_machine(tiny, workers=2, chunks=3)


def start_run(tmp_path: Path) -> tuple[subprocess.Popen[str], Path, list[int]]:
    """``quire run --workers 2``, once it has written something, and its workers."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": f"Chapter {i}", "max_tokens": 4 + 60 * (i % 2)} for i in range(5000)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["run", source, "-o", out, "--order", "completion", "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "quire", *map(str, words), "--kv-memory", "32MiB"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also under nohup
    )
    deadline = time.monotonic() + 180
    while not out.exists() or out.stat().st_size < 2000:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(workers) == 2
    return process, out, workers


@pytest.mark.slow
def test_an_interrupt_ends_all(tmp_path: Path) -> None:
    process, out, workers = start_run(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted" in errors
    assert "Traceback" not in errors
    assert 0 < len([json.loads(line) for line in out.read_text().splitlines()]) < 5000
    wait_for_end(workers)


@pytest.mark.slow
def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    process, _, workers = start_run(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    wait_for_end(workers)


@pytest.mark.slow
def test_workers_end_while_they_load(tiny: Path) -> None:
    code = (
        "import sys, time\n"
        "from quire.fleet import processes\n"
        "child = processes._Child([0], {'model': sys.argv[1]})\n"
        "child.start()\n"
        "print(child._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for_end([worker], seconds=60)


@pytest.mark.slow
def test_a_fleet_runs_in_any_thread(tiny: Path) -> None:
    found: list[int] = []

    def work() -> None:
        with on_this_machine(tiny, workers=1, **OPTIONS) as fleet:
            found.extend(o.request_id for o in fleet.generate_iter(rows(5)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert sorted(found) == list(range(5))
