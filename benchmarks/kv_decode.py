"""A decode step over long KV held in several ways: its attention, and the whole step.

``python benchmarks/kv_decode.py [--folder F] [--tokens N] [--batch N]`` prints, for the 1.1B shape
with random weights, milliseconds of a step in which each of ``--batch`` sequences reads its own
``--tokens`` tokens: with exact KV, with packed KV, with fewer entries kept, and with fetched ones.
Repetitions of all ways alternate. The attention is the engine's, called with random queries; the
whole step runs the model beside it, and leaves out the logits. ``--whole no`` does without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.attention.segments import Item
from quire.bench.shapes import SHAPES, make_checkpoint
from quire.engine.facts import make_facts
from quire.engine.keeper import Chunk
from quire.engine.runner import Runner
from quire.engine.world import Work
from quire.kernels import native
from quire.kernels.kv import PAGE
from quire.kv.arena import TiledArena
from quire.kv.fetch.landmarks import Landmarks
from quire.kv.method import Asked, Entries, Facts, Index, Reader, Recipe
from quire.kv.pages import PagePool, Segment, Span
from quire.kv.store.packed import Codes, Format, Packed
from quire.models.decoder import Attend
from quire.models.loader import load_model, load_spec
from quire.models.spec import ModelSpec


@dataclass
class AttentionAlone:
    """A model that does nothing but call the attention of each layer."""

    spec: ModelSpec
    rows: int
    inputs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        sizes = (spec.heads, spec.kv_heads, spec.kv_heads)
        self.inputs = [torch.randn(self.rows, n, spec.head_dim).bfloat16() for n in sizes]

    def forward(
        self, _ids: Tensor, _positions: Tensor, attend: Attend, *, rows: Tensor | None = None
    ) -> Tensor:
        """Attention of all layers over the same queries, of every row."""
        assert rows is None
        out = self.inputs[0]
        for layer in range(len(self.spec.layers)):
            out = attend(layer, *self.inputs, None)
        return out


@dataclass
class Keeper:
    """What the runner asks of a keeper: what is fetched, and which segments are indexed."""

    recipe: Recipe = field(default_factory=Recipe)
    found: dict[Segment, Index] = field(default_factory=dict)

    def indexes(self, _works: Sequence[Work]) -> dict[Segment, Index]:
        """The indexes, made beforehand."""
        return self.found

    def reader(self, _sequence: Any, token: int, position: int) -> Reader:
        """Nobody keeps state here."""
        return Reader(token, position, {})

    def chunks(self, _works: Sequence[Work]) -> list[Chunk]:
        """Nothing is prefilled."""
        return []

    def watch(self, *_arguments: Any) -> None:
        """Nothing is selected."""


@dataclass
class Way:
    """One way to hold the KV of all sequences."""

    works: list[Work]
    keeper: Keeper | None
    bytes_read: int  # in a step, of keys and values and what finds them


class Memory:
    """An arena with room for everything, and the sequences in it."""

    def __init__(self, spec: ModelSpec, batch: int, tokens: int, slots: int) -> None:
        self.spec, self.batch, self.tokens = spec, batch, tokens
        self.pool = PagePool(-(-slots // PAGE), PAGE)
        self.arena = TiledArena.make(
            len(spec.layers), spec.kv_heads, spec.head_dim, self.pool.pages * PAGE, torch.bfloat16
        )
        for tensor in (self.arena.keys, self.arena.values):
            for layer in tensor:
                layer.normal_()

    @property
    def entry_bytes(self) -> int:
        """Of one token in all layers."""
        return 4 * len(self.spec.layers) * self.spec.kv_heads * self.spec.head_dim

    def segment(self, entries: int) -> Segment:
        """A new segment in the arena."""
        made = Segment()
        self.pool.append(made, entries)
        return made

    def work(self, place: int, above: Segment) -> Work:
        """A sequence that computes its first token after ``above``, which stands for all before."""
        own = self.segment(1)
        item = Item((place,), self.tokens, 1, own, ((above, 0),))
        return Work(item, np.ones(1, dtype=np.int32), own.slots[:1], None, SimpleNamespace())  # type: ignore[arg-type]

    def held(self, entries: int) -> tuple[list[Segment], Way]:
        """Sequences that hold ``entries`` each in the arena."""
        segments = [self.segment(entries) for _ in range(self.batch)]
        for segment in segments:
            segment.length = self.tokens  # the others were dropped
        works = [self.work(i, s) for i, s in enumerate(segments)]
        return segments, Way(works, None, self.batch * entries * self.entry_bytes)

    def packed(self, keys: Format, values: Format) -> Way:
        """Sequences that hold all tokens packed. Numbers repeat, but not in memory."""
        spec = self.spec
        shape = (spec.kv_heads, self.tokens, spec.head_dim)
        positions = torch.arange(self.tokens).expand(shape[:2])
        entries = Entries(torch.randn(shape), torch.randn(shape), positions)
        one = Packed.make([entries], keys, values)
        works, total = [], 0
        for i in range(self.batch):
            layers = range(len(spec.layers))
            data = Packed(
                tuple(_copied(one.keys[0]) for _ in layers),
                tuple(_copied(one.values[0]) for _ in layers),
                0,
            )
            total += data.nbytes
            segment = Segment(length=self.tokens)
            segment.stored = [Span(data, 0, self.tokens, frozenset())]
            works.append(self.work(i, segment))
        return Way(works, Keeper(), total)

    def fetched(self, facts: Facts, segments: list[Segment], method: Landmarks) -> Way:
        """Sequences that hold all tokens in the arena and fetch some."""
        found: dict[Segment, Index] = {}
        total = 0
        for segment in segments:
            slots = torch.from_numpy(segment.slots[: self.tokens])  # not all of the last page

            def layers(layer: int, slots: Tensor = slots) -> Entries:
                k, v = self.arena.read(layer, slots)
                return Entries(k, v, torch.arange(len(slots)).expand(k.shape[:2]))

            index = method.index(facts, layers, np.zeros(self.tokens, dtype=np.int32), _no_queries)
            assert index is not None
            found[segment] = index
            q = torch.randn(1, facts.heads, facts.head_dim).bfloat16()
            (chosen,) = method.choose(0, q, [], [Asked(0, 1, index, self.tokens)])
            _, entries = chosen.places(self.tokens)[0].shape[1:]
            means = index.means  # type: ignore[attr-defined]
            total += entries * self.entry_bytes + sum(m.nbytes for m in means)
        works = [self.work(i, s) for i, s in enumerate(segments)]
        return Way(works, Keeper(Recipe(fetch=method), found), total)


def _no_queries(_layer: int) -> Tensor:
    raise AssertionError("landmarks look at no queries")


def _copied(codes: Codes) -> Codes:
    assert codes.middle is not None
    return replace(
        codes, codes=codes.codes.clone(), scale=codes.scale.clone(), middle=codes.middle.clone()
    )


def make_ways(memory: Memory, facts: Facts) -> dict[str, Way]:
    """All that are compared, exact KV first."""
    bf16 = torch.bfloat16
    dim = facts.head_dim
    exact, way = memory.held(memory.tokens)
    ways = {"bf16": way}
    token = Format(8, dim, False, bf16)
    ways["int8, by token"] = memory.packed(token, token)
    for bits in (4, 2):
        for group in (32, 64):
            keys, values = Format(bits, group, True, bf16), Format(bits, group, False, bf16)
            ways[f"kivi, {bits} bits, groups of {group}"] = memory.packed(keys, values)
    for budget in (1024, 2048):
        ways[f"snapkv, {budget}"] = memory.held(budget)[1]
    for budget, chunk in ((1024, 8), (2048, 8), (2048, 16)):
        method = Landmarks(budget=budget, chunk=chunk)
        name = f"landmarks, {budget} in chunks of {chunk}"
        ways[name] = memory.fetched(facts, exact, method)
    return ways


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other, ``repeats`` times after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:
                taken[name].append(time.perf_counter() - started)
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("bench-out"), help="of the checkpoint")
    parser.add_argument("--shape", default="1.1b", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--whole", default="yes", choices=["yes", "no"], help="run the model too")
    args = parser.parse_args()
    torch.manual_seed(0)
    native.configure()
    checkpoint = make_checkpoint(args.shape, args.folder)
    spec = load_spec(checkpoint)
    slots = args.batch * (args.tokens + 3072 + 12 * PAGE)
    memory = Memory(spec, args.batch, args.tokens, slots)
    model = load_model(checkpoint) if args.whole == "yes" else None
    alone = AttentionAlone(replace(spec, placement="post"), args.batch)  # no layers to fuse
    facts = make_facts(model or SimpleNamespace(spec=spec, dtype=torch.bfloat16), None)  # type: ignore[arg-type]
    ways = make_ways(memory, facts)

    def step(model: Any, way: Way) -> Callable[[], object]:
        runner = Runner(model, memory.arena, keeper=way.keeper)  # type: ignore[arg-type]
        return lambda: runner.forward(way.works)

    attention = alternate({n: step(alone, w) for n, w in ways.items()}, args.repeats)
    whole = (
        alternate({n: step(model, w) for n, w in ways.items()}, args.repeats)
        if model is not None
        else {}
    )
    print(f"{args.batch} sequences of {args.tokens:,} tokens, {args.shape}, {native.active()}")
    print(
        f"{'':34}{'attention, ms':>22}{'faster':>8}{'KV read, MB':>13}{'step, ms':>20}{'faster':>8}"
    )
    rows = []
    for name, way in ways.items():
        row = {"way": name, "kv_bytes": way.bytes_read}
        line = f"{name:34}"
        for kind, taken in (("attention", attention), ("step", whole)):
            if not taken:
                continue
            seconds = taken[name]
            middle = statistics.median(seconds)
            row |= {kind: middle, f"{kind}_least": min(seconds), f"{kind}_most": max(seconds)}
            spread = f"{1e3 * middle:.1f} ({1e3 * min(seconds):.1f}-{1e3 * max(seconds):.1f})"
            ratio = statistics.median(taken["bf16"]) / middle
            line += f"{spread:>22}{ratio:>7.2f}x"
            if kind == "attention":
                line += f"{way.bytes_read / 1e6:>13,.0f}"
        print(line)
        rows.append(row)
    print(json.dumps({"batch": args.batch, "tokens": args.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
