"""Attention over a shared prefix: read once for all readers, once for each, or a copy for each.

``python benchmarks/attention.py [--readers N] [--prefix N]`` prints milliseconds of one layer of
the 135M shape (9 heads, 3 KV heads of 64 numbers, bfloat16). The second is per-request attention
over shared pages, the third over KV that is not shared at all.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from quire.attention import native as attention
from quire.attention.segments import Item
from quire.kernels import native
from quire.kv.arena import TiledArena
from quire.kv.pages import PagePool, Segment

SHAPE = attention.Shape(layers=1, heads=9, kv_heads=3, head_dim=64)
OWN = 32  # tokens of a reader itself


def best_seconds(arena: TiledArena, items: list[Item], runs: int = 20) -> float:
    """The fastest of several runs of one decode step."""
    plan = attention.Plan.make(items, SHAPE, None)
    q = torch.randn(len(items), SHAPE.heads, SHAPE.head_dim).bfloat16()
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        attention.attend(arena, 0, q, plan, scale=0.125)
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, default=64)
    parser.add_argument("--prefix", type=int, default=8192, help="tokens")
    args = parser.parse_args()
    native.configure()
    pages = -(-args.prefix // 16) * (args.readers + 1) + args.readers * -(-OWN // 16)
    pool = PagePool(pages, 16)
    arena = TiledArena.make(1, SHAPE.kv_heads, SHAPE.head_dim, pool.pages * 16, torch.bfloat16)
    arena.keys.normal_()
    arena.values.normal_()

    def segment(tokens: int) -> Segment:
        made = Segment()
        pool.append(made, tokens)
        return made

    prefix = segment(args.prefix)
    at = args.prefix + OWN - 1
    own = [segment(OWN) for _ in range(args.readers)]
    shared = [Item((0, i), at, 1, s, ((prefix, 0),)) for i, s in enumerate(own)]
    alike = [replace(prefix) for _ in own]
    alone = [Item((i,), at, 1, s, ((alike[i], 0),)) for i, s in enumerate(own)]
    copies = [Item((i,), at, 1, s, ((segment(args.prefix), 0),)) for i, s in enumerate(own)]
    together = best_seconds(arena, shared)
    print(f"{args.readers} readers of {args.prefix:,} tokens, ms a layer")
    for name, items in (
        ("read once for all", shared),
        ("read once for each", alone),
        ("a copy for each", copies),
    ):
        seconds = best_seconds(arena, items)
        print(f"  {name:<20}{1000 * seconds:8.2f}   {seconds / together:.1f}x")


if __name__ == "__main__":
    main()
