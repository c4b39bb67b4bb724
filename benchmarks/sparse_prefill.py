"""Sparse prefill: what it reads, what it misses, and its time against dense native attention.

``python benchmarks/sparse_prefill.py [--tokens N] [--chunk C] [--recipe R]`` computes one layer's
attention of the 135M shape (9 heads, 3 KV heads of 64 numbers, bfloat16) for a prompt, chunk by
chunk, as the engine does. For each recipe it prints the share of the keys that is read (density),
the share of the dense attention's weight on these (recovered), the relative error of the output,
and milliseconds: of choosing, with reading the keys back from the arena, of attending, and how much
faster both are than dense attention in the same run.

Queries and keys are made: topics of 200 tokens, and one key in ``--hot`` that all queries look for.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from quire.attention import chosen
from quire.attention import native as dense
from quire.attention.segments import Item
from quire.kernels import native
from quire.kernels.kv import PAGE
from quire.kv.arena import TiledArena
from quire.kv.method import Calibration, Entries, Facts, Sparse
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
RECIPES = ["pbs", "pbs(permute=false)", "pbs(threshold=0.7)", "pbs(rank=32)", "dhsa"]


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
        pool = PagePool(-(-tokens // PAGE), PAGE)
        size = pool.pages * PAGE
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


@dataclass
class Total:
    """What a recipe has cost so far: milliseconds, pairs of queries and keys, squares."""

    choosing: float = 0.0
    attending: float = 0.0
    read: float = 0.0
    mass: float = 0.0  # of rows' attention, that is recovered
    wrong: float = 0.0
    right: float = 0.0


def recovered(q: Tensor, entries: Entries, choice: chosen.Choice, block: int) -> float:
    """The mean share of the rows' dense attention on keys that they read, by a row a block."""
    start = len(entries) - len(q)
    found = []
    for b, heads in enumerate(choice):
        row = min(b * block + block // 2, len(q) - 1)
        for head, places in enumerate(heads):
            mine = q[row].unflatten(0, (KV_HEADS, -1))[head].float()
            keys = entries.keys[head, : start + row + 1].float()
            weights = (mine @ keys.T * FACTS.scale).softmax(-1).mean(0)
            found.append((weights[places].sum() + weights[start + b * block :].sum()).item())
    return statistics.mean(found)


T = TypeVar("T")


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """Milliseconds, the best of three runs, and the result."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        result = run()
        taken.append(time.perf_counter() - started)
    return 1000 * min(taken), result


def measure(prompt: Prompt, chunk: int, method: Sparse, total: Total) -> float:
    """Add up what all chunks of ``prompt`` cost; returns milliseconds of dense attention."""
    tokens, block, base = len(prompt.q), method.block, 0.0
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        q, rows = prompt.q[start:end], end - start
        taken, wanted = timed(prompt.dense(start, rows))
        base += taken
        if end <= method.least or rows < block:
            total.attending += taken
            total.read += rows * start + rows * (rows + 1) / 2
            total.mass += rows
            continue

        def choose(start: int = start, end: int = end, q: Tensor = q) -> tuple[Entries, Any]:
            entries = prompt.entries(end)
            return entries, method.choose(FACTS, 0, q, entries, start)

        taken, (entries, choice) = timed(choose)
        total.choosing += taken
        attend = partial(chosen.attend, q, entries, choice, block, scale=FACTS.scale)
        taken, out = timed(attend)
        total.attending += taken
        for b, heads in enumerate(choice):
            size = min(block, rows - b * block)
            total.read += size * sum(map(len, heads)) / KV_HEADS + size * (size + 1) / 2
        total.mass += rows * recovered(q, entries, choice, block)
        total.wrong += (out.float() - wanted.float()).square().sum().item()
        total.right += wanted.float().square().sum().item()
    return base


def main() -> None:
    """Print a line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--hot", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--recipe", action="append", help="repeatable")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    native.configure()
    torch.manual_seed(0)
    prompt = Prompt(*made(args.tokens, args.hot))
    print(f"{args.tokens:,} tokens in chunks of {args.chunk:,}, ms a layer")
    print(f"  {'':<32}density  recovered  error  choose  attend   dense  faster")
    pairs = args.tokens * (args.tokens + 1) / 2
    with torch.inference_mode():
        for recipe in args.recipe or RECIPES:
            method, total = parse(recipe).sparse, Total()
            assert method is not None
            dense_ms = measure(prompt, args.chunk, method, total)
            error = math.sqrt(total.wrong / max(total.right, 1e-30))
            print(
                f"  {recipe:<32}{total.read / pairs:7.1%}{total.mass / args.tokens:11.1%}"
                f"{error:7.2f}{total.choosing:8.0f}{total.attending:8.0f}{dense_ms:8.0f}"
                f"{dense_ms / (total.choosing + total.attending):7.2f}x"
            )


if __name__ == "__main__":
    main()
