"""Made-up runs for tests of what shows a run."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from quire.api.outputs import Stats
from quire.engine.budget import Budget
from quire.errors import InvalidRequestError, PromptTooLongError
from quire.jobs.recorder import Recorder
from quire.jobs.run import Summary
from quire.schedule.groups import Group

BUDGET = Budget(6 << 30, 8 << 30, 270 << 20, 400 << 20, 500 << 20, 1 << 30, 46080)
SETTINGS: dict[str, object] = {"source": "questions.jsonl", "model": "demo", "stop": None}


def decode(ids: Sequence[int]) -> str:
    """Text of token ids."""
    return " ".join(f"word{i}" for i in ids)


def summarise(recorder: Recorder, seconds: float, *, interrupted: bool = False) -> Summary:
    """The summary that a job with this record has."""
    stats = recorder.stats
    return Summary(
        model="demo",
        policy="batch",
        state="interrupted" if interrupted else "done",
        resumable=True,
        load_seconds=1.25,
        seconds=seconds,
        rows_ok=recorder.rows_ok,
        rows_failed=recorder.failures.count,
        rows_before=recorder.rows_before,
        duplicates=0,
        prompt_tokens=stats.prompt_tokens,
        computed_tokens=stats.computed_tokens,
        recomputed_tokens=stats.recomputed_tokens,
        loaded_tokens=stats.loaded_tokens,
        saved_tokens=stats.saved_tokens,
        output_tokens=stats.output_tokens,
        tokens_per_second=(stats.prompt_tokens + stats.output_tokens) / seconds,
        output_tokens_per_second=stats.output_tokens / seconds,
        steps=stats.steps,
        preemptions=stats.preemptions,
        plan_seconds=stats.plan_seconds,
        model_seconds=stats.model_seconds,
        sample_seconds=stats.sample_seconds,
        kv_bytes=BUDGET.kv,
        peak_kv_bytes=stats.peak_kv_bytes,
        peak_rss_bytes=1800 << 20,
    )


def fail(recorder: Recorder, line: int, kind: int) -> None:
    """Record a failed row of one of three kinds."""
    errors = (
        InvalidRequestError("This is not JSON: Expecting value: line 1 column 1 (char 0)."),
        PromptTooLongError(
            f"The prompt has {3000 + line} tokens; the context holds 2304 and needs room for at "
            "least one more.",
            field="prompt",
            action="Shorten it, or use --on-overlong truncate-left or truncate-right.",
        ),
        InvalidRequestError(
            f"model is 'gpt-{line}'; this run serves demo.", field="model", action="Leave it out."
        ),
    )
    recorder.row(line, None if kind == 0 else f"request-{line:07}", 0, (), errors[kind % 3])


def make_run(rows: int, *, share: float = 0.7, failing: float = 0.001) -> tuple[Recorder, float]:
    """A record of ``rows`` rows, and its seconds: waves of prefill and decode, KV that fills up."""
    random.seed(5)
    now = 0.0
    recorder = Recorder(clock=lambda: now)
    stats = Stats(kv_bytes=BUDGET.kv)
    recorder.start(stats)
    per_step = 8
    for line in range(1, rows + 1):
        if random.random() < failing:
            fail(recorder, line, random.choice([0, 1, 1, 1, 2]))
        else:
            outputs = max(1, min(512, int(random.lognormvariate(4, 0.7))))
            recorder.row(
                line, f"r{line}", int(random.lognormvariate(6.5, 0.8)) + 1, [outputs], None
            )
        if line % per_step:
            continue
        wave = 0.5 + 0.5 * math.sin(40 * line / rows)
        prefill = int(512 * wave * random.uniform(0.6, 1))
        decode_tokens = 512 - prefill if random.random() < 0.9 else 40
        seconds = random.uniform(0.1, 0.2)
        now += seconds
        used = int(BUDGET.kv * min(1.0, 3 * line / rows) * random.uniform(0.7, 0.98))
        stats = replace(
            stats,
            steps=stats.steps + 1,
            running=int(200 * wave) + 20,
            waiting=rows - line,
            prompt_tokens=stats.prompt_tokens + int(prefill / (1 - share)),
            computed_tokens=stats.computed_tokens + prefill,
            decode_tokens=stats.decode_tokens + decode_tokens,
            output_tokens=stats.output_tokens + decode_tokens,
            model_seconds=stats.model_seconds + 0.8 * seconds,
            sample_seconds=stats.sample_seconds + 0.1 * seconds,
            plan_seconds=stats.plan_seconds + 0.05 * seconds,
            step_seconds=stats.step_seconds + 0.95 * seconds,
            kv_used_bytes=used,
            peak_kv_bytes=max(stats.peak_kv_bytes, used),
        )
        recorder.step(stats)
    recorder.rows_total = rows
    for window in range(5):
        recorder.groups(
            [
                Group(
                    key=bytes([i]),
                    start=0 if i == 0 else 900,
                    end=900 if i == 0 else 900 + 64 * i,
                    head=tuple(range(64)),
                    readers=(rows // 5) // (i + 1),
                    older=0,
                    saved=900 * (rows // 5) // (i + 1),
                )
                for i in range(40 if window == 0 else 3)
            ]
        )
    return recorder, now + 0.5
