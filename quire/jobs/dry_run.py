"""``quire run --dry-run``: the plan of a job, without loading weights."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from quire.api.setup import Setup
from quire.engine.budget import format_bytes
from quire.engine.limits import PAGE_TOKENS
from quire.errors import RequestError
from quire.jobs.progress import format_seconds
from quire.jobs.rows import BadRow, Row
from quire.kv.pages import PagePool
from quire.kv.tree import PrefixTree
from quire.schedule.planner import computed_tokens, decide_segments, one_level_saving


@dataclass(frozen=True)
class DryRun:
    """What a job would do. Tokens, bytes, seconds."""

    rows: int
    bad_rows: int
    prompt_tokens: int
    computed_tokens: int
    one_level_tokens: int  # computed if prefixes were shared on one level only
    output_limit: int
    largest_request_bytes: int
    kv_bytes: int
    plan_seconds: float
    estimated_seconds: float

    def text(self) -> str:
        """The plan for people."""
        saved = self.prompt_tokens - self.computed_tokens
        share = 100 * saved / self.prompt_tokens if self.prompt_tokens else 0.0
        one = self.prompt_tokens - self.one_level_tokens
        return "\n".join(
            [
                f"rows            {self.rows} good, {self.bad_rows} bad",
                f"prompt tokens   {self.prompt_tokens:,}",
                f"saved           {saved:,} by sharing ({share:.1f}%); one level of sharing "
                f"would save {one:,}",
                f"to compute      {self.computed_tokens:,} prompt tokens and at most "
                f"{self.output_limit:,} output tokens",
                f"largest request {format_bytes(self.largest_request_bytes)} of KV; the pool has "
                f"{format_bytes(self.kv_bytes)}",
                f"planned in      {format_seconds(self.plan_seconds)}",
                f"estimated time  {format_seconds(self.estimated_seconds)} at most (all outputs "
                "at their limit, arithmetic only)",
            ]
        )


def dry_run(setup: Setup, rows: Iterable[Row | BadRow]) -> DryRun:
    """Plan all rows as one window."""
    started = time.perf_counter()
    tree = PrefixTree(PagePool(0, PAGE_TOKENS))
    good = bad = asked = outputs = largest = 0
    for row in rows:
        try:
            if isinstance(row, BadRow):
                raise row.error
            ids = setup.encode(row.prompt)[1]
            limit = setup.limits.output_tokens(len(ids), row.params.max_tokens)
        except RequestError:
            bad += 1
            continue
        good += 1
        leaf = tree.insert(np.array(ids, dtype=np.int32), shared=row.params.prompt_logprobs is None)
        for _ in range(row.params.n):
            tree.retain(leaf)
        asked += len(ids) * row.params.n
        outputs += limit * row.params.n
        largest = max(largest, len(ids) + limit)
    one_level = asked - one_level_saving(tree.root)
    decide_segments(tree.root)
    computed = computed_tokens(tree.root)
    seconds = time.perf_counter() - started
    rate = matmul_rate(setup.dtype)
    weights = setup.budget.weights / setup.dtype.itemsize
    return DryRun(
        rows=good,
        bad_rows=bad,
        prompt_tokens=asked,
        computed_tokens=computed,
        one_level_tokens=one_level,
        output_limit=outputs,
        largest_request_bytes=largest * setup.budget.kv_token,
        kv_bytes=setup.budget.kv,
        plan_seconds=seconds,
        estimated_seconds=2 * weights * (computed + outputs) / rate,
    )


def matmul_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """Floating-point operations a second of this machine's large matrix products."""
    a = torch.randn(size, size).to(dtype)
    a @ a
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ a
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)
