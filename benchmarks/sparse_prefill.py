"""Sparse prefill: what it reads, what it misses, and its time against dense native attention.

``python benchmarks/sparse_prefill.py [--tokens N] [--chunk C] [--recipe R]`` computes one layer's
attention of the 135M shape (9 heads, 3 KV heads of 64 numbers, bfloat16) for a prompt, chunk by
chunk, as the engine does, and prints for each recipe the share of the keys that is read (density),
the share of the dense attention's weight on these (recovered), the relative error of the output,
and milliseconds: choosing, attending, and both against dense attention in the same run.

The queries and keys are the demonstration model's or, without ``--model``, made: smooth topics,
with one key in ``--hot`` that all queries look for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.attention import chosen
from quire.attention import native as dense
from quire.attention.segments import Item
from quire.kernels import native
from quire.kv.arena import TiledArena
from quire.kv.method import Calibration, Entries, Facts
from quire.kv.pages import PagePool, Segment
from quire.kv.recipes import parse

HEADS, KV_HEADS, DIM = 9, 3, 64
SHAPE = dense.Shape(layers=1, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
FACTS = Facts(
    layers=1,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_dim=DIM,
    dtype=torch.bfloat16,
    scale=DIM**-0.5,
    windows=(None,),
    turn=lambda *given: given[1],
    calibrate=lambda: Calibration([], [], []),
)
RECIPES = ["pbs", "pbs(permute=false)"]


def made(tokens: int, hot: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[tokens, heads, dim]``, keys and values ``[tokens, kv_heads, dim]``.

    Topics last some 200 tokens; queries look for their own topic, and for hot keys.
    """
    topics = torch.randn(16, KV_HEADS, DIM)
    topic = torch.randint(16, (-(-tokens // 200),)).repeat_interleave(200)[:tokens]
    wanted = torch.randn(KV_HEADS, DIM)
    is_hot = (torch.rand(tokens, KV_HEADS) < 1 / hot)[..., None]
    keys = torch.randn(tokens, KV_HEADS, DIM) + 0.5 * topics[topic] + 1.2 * is_hot * wanted
    asked = (0.4 * topics[topic] + 0.6 * wanted).repeat_interleave(HEADS // KV_HEADS, 1)
    q = 0.7 * torch.randn(tokens, HEADS, DIM) + asked
    return q.bfloat16(), keys.bfloat16(), torch.randn(tokens, KV_HEADS, DIM).bfloat16()


@dataclass
class Prompt:
    """A prompt's queries, and its KV in an arena."""

    q: Tensor
    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        tokens = len(self.q)
        pool = PagePool(-(-tokens // native.PAGE), native.PAGE)
        size = pool.pages * native.PAGE
        self.arena = TiledArena.make(1, KV_HEADS, DIM, size, torch.bfloat16)
        self.segment = Segment()
        self.slots = torch.from_numpy(pool.append(self.segment, tokens))
        self.arena.write(0, self.slots, self.keys, self.values)

    def dense(self, start: int, rows: int) -> Callable[[], Tensor]:
        """Attention of a chunk over everything."""
        end = start + rows
        segment = Segment(self.segment.extents, self.segment.slots, end, end)
        plan = dense.Plan.make([Item((0,), start, rows, segment, ())], SHAPE, None)
        q = self.q[start:end]
        return lambda: dense.attend(self.arena, 0, q, plan, scale=FACTS.scale)

    def entries(self, end: int) -> Entries:
        """Everything before ``end``, read as the engine reads it."""
        k, v = self.arena.read(0, self.slots[:end])
        return Entries(k, v, torch.arange(end).expand(KV_HEADS, -1))


def recovered(q: Tensor, entries: Entries, choice: chosen.Choice, block: int) -> float:
    """The share of some rows' dense attention that is on keys that they read."""
    start = len(entries) - len(q)
    found = []
    for b, heads in enumerate(choice):
        row = min(b * block + block // 2, len(q) - 1)
        for head, places in enumerate(heads):
            mine = q[row].unflatten(0, (KV_HEADS, -1))[head].float()
            keys = entries.keys[head, : start + row + 1].float()
            weights = (mine @ keys.T * FACTS.scale).softmax(-1).mean(0)
            own = weights[start + b * block :].sum()
            found.append((weights[places].sum() + own).item())
    return statistics.mean(found)


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Milliseconds, the better of two, and the result."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        result = run()
        taken.append(time.perf_counter() - started)
    return 1000 * min(taken), result


def measure(prompt: Prompt, chunk: int, recipes: list[str]) -> None:
    """Print a line for each recipe."""
    tokens = len(prompt.q)
    base = 0.0
    totals = {recipe: [0.0] * 7 for recipe in recipes}  # read, choose, attend, ms; keys; misses
    for start in range(0, tokens, chunk):
        rows = min(chunk, tokens - start)
        q = prompt.q[start : start + rows]
        taken, wanted = timed(prompt.dense(start, rows))
        base += taken
        for recipe, total in totals.items():
            method = parse(recipe).sparse
            assert method is not None
            reading, _ = timed(lambda: prompt.entries(start + rows).keys)  # noqa: B023
            entries = prompt.entries(start + rows)
            if start + rows <= method.least:
                total[1] += taken
                total[3] += rows * start
                continue
            began = time.perf_counter()
            choice = method.choose(FACTS, 0, q, entries, start)
            choosing = 1000 * (time.perf_counter() - began)
            attending, out = timed(
                lambda: chosen.attend(q, entries, choice, method.block, scale=FACTS.scale)  # noqa: B023
            )
            total[0] += reading + choosing
            total[1] += attending
            sizes = [sum(map(len, heads)) / KV_HEADS for heads in choice]
            total[2] += sum(min(method.block, rows - b * method.block) * n for b, n in enumerate(sizes))
            total[2] += sum(r % method.block + 1 for r in range(rows))
            total[4] += rows * recovered(q, entries, choice, method.block)
            total[5] += (out.float() - wanted.float()).square().sum().item()
            total[6] += wanted.float().square().sum().item()
