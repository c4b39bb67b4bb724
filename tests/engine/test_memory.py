from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quire.engine.budget import format_bytes, make_budget, parse_bytes, workspace_bytes
from quire.errors import InvalidRequestError, MemoryBudgetError
from quire.models.loader import load_spec

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 << 30), ("500MB", 500 * 10**6), ("1.5g", 15 * 10**8), ("2kib", 2048), (77, 77)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1MiB", "6 TiBs", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not a size"):
        parse_bytes(text)


def test_format() -> None:
    assert [format_bytes(n) for n in (5, 2048, 3 * MIB, 5 << 30)] == [
        "5 B", "2.0 KiB", "3.0 MiB", "5.00 GiB",
    ]  # fmt: skip


def test_shares_add_up(tinystories: Path) -> None:
    spec = load_spec(tinystories)
    options = {"dtype": torch.float32, "chunk": 64, "kv_token": 2560}
    budget = make_budget(spec, 10 * MIB, memory=2000 * MIB, kv_memory=None, **options)
    parts = budget.weights + budget.workspace + budget.reserve + budget.kv
    assert parts == budget.asked == 2000 * MIB
    assert workspace_bytes(spec, 128, torch.float32) > budget.workspace
    exact = make_budget(spec, 10 * MIB, memory=None, kv_memory=MIB, **options)
    assert exact.kv == MIB
    with pytest.raises(MemoryBudgetError, match="hold no page"):
        make_budget(spec, 10 * MIB, memory=None, kv_memory=2560 * 15, **options)


@pytest.mark.slow
def test_the_limit_is_kept(tinystories: Path) -> None:
    """A process whose KV is full stays below its --memory."""
    code = f"""
import resource
from quire import LLM, SamplingParams
with LLM({str(tinystories)!r}, dtype="float32", memory="1000MiB", chunk=128, threads=1) as llm:
    prompts = [dict(prompt_token_ids=[3 + (i * j) % 500 for j in range(1, 400)]) for i in range(99)]
    llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


@pytest.mark.slow
def test_watchdog_dumps_the_state_and_interrupts() -> None:
    code = """
import time
from quire.engine.watchdog import Watchdog
with Watchdog(0.3, lambda: "the state of things") as dog:
    time.sleep(1)  # between steps nothing is wrong
    print("fired", dog.fired)
    dog.start()
    try:
        time.sleep(20)
    except KeyboardInterrupt:
        print("fired", dog.fired)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also under nohup
    )
    assert done.stdout == "fired False\nfired True\n"
    assert "A step has taken more than 0.3 s." in done.stderr
    assert "the state of things" in done.stderr
    assert "line 9" in done.stderr  # where it hangs
