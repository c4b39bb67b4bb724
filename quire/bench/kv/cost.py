"""What a recipe costs: bytes held and read, and speed, on a few sequences of prose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from quire.bench.kv.forced import Forced, Script, Span
from quire.bench.kv.memory import Held, measure_held
from quire.kv.method import Asked, Chosen, Entries, Facts, Fetch, Index, Reader, Recipe
from quire.kv.tree import Tokens

OUTPUT = 32  # tokens that each sequence decodes


@dataclass(frozen=True)
class Cost:
    """Bytes a token of a sequence in steady state, metadata counted: held in RAM, and read by a
    decode step; the most bytes held at any time, of all sequences; tokens a second; and bytes a
    token that lie on disk, which are read but not held.
    """

    held_per_token: float
    read_per_token: float
    peak_bytes: int
    prefill_per_second: float
    decode_per_second: float
    disk_per_token: float = 0.0


@dataclass
class Counting:
    """A `Fetch` that counts how many entries it chooses, and of how many."""

    fetch: Fetch
    chosen: int = 0
    offered: int = 0

    @property
    def window(self) -> int:
        """See `Fetch.window`."""
        return self.fetch.window

    def index(
        self,
        facts: Facts,
        layers: Callable[[int], Entries],
        tokens: Tokens,
        queries: Callable[[int], Tensor],
    ) -> Index | None:
        """See `Fetch.index`."""
        return self.fetch.index(facts, layers, tokens, queries)

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader], asked: Sequence[Asked]
    ) -> list[Chosen]:
        """See `Fetch.choose`."""
        found = self.fetch.choose(layer, q, readers, asked)
        for a, chosen in zip(asked, found, strict=True):
            places, mask = chosen.places(a.entries)
            self.chosen += places.numel() if mask is None else int(mask.sum())
            self.offered += places.shape[0] * places.shape[1] * a.entries
        return found


def measure_cost(
    make: Callable[[Recipe, int], Forced], recipe: Recipe, texts: Sequence[Tokens], rounds: int
) -> Cost:
    """Run ``texts``, of one length, together; the last tokens of each are decoded.

    ``make(recipe, tokens)``: an engine with room for so many tokens. The fastest of ``rounds``
    counts. Steps that compute any prompt are prefill, all others decoding.
    """
    return min((_measure(make, recipe, texts) for _ in range(rounds)), key=_slowness)


def _slowness(cost: Cost) -> float:
    return 1 / cost.decode_per_second + 1 / cost.prefill_per_second


def _measure(
    make: Callable[[Recipe, int], Forced], recipe: Recipe, texts: Sequence[Tokens]
) -> Cost:
    count = None if recipe.fetch is None else Counting(recipe.fetch)
    engine = make(replace(recipe, fetch=count), sum(map(len, texts)))
    counters, pool = engine.world.counters, engine.world.pool
    page = engine.limits.page_bytes
    one_by_one = (Span(0, OUTPUT),)
    started = time.perf_counter()
    engine.begin([Script(text[:-OUTPUT], text[-OUTPUT:], one_by_one) for text in texts])
    prefill, decode = time.perf_counter() - started, 0.0
    output = peak = steps = tokens = 0
    held = Held(0, 0, 0)
    while engine.unfinished:
        computed, written = counters.prompt_computed, counters.output
        started = time.perf_counter()
        engine.step()
        taken = time.perf_counter() - started
        if counters.prompt_computed > computed:
            prefill += taken
        else:
            decode += taken
            output += counters.output - written
            steps += 1
        now = measure_held(engine)
        peak = max(peak, pool.peak_pages * page + now.index + now.notes)
        if engine.unfinished == len(texts):
            held = now
            tails = sum(seq.tail.length for seq in engine.world.state.running)
            tokens = tails + sum(len(text) - OUTPUT for text in texts)
    spec = engine.runner.model.spec
    everything = tokens * len(spec.layers) * spec.kv_heads
    skipped = 0.0 if count is None else (count.offered - count.chosen) / steps / everything
    return Cost(
        held.total / tokens,
        ((held.kv + held.disk) * (1 - skipped) + held.index + held.notes) / tokens,
        peak,
        sum(len(text) - OUTPUT for text in texts) / prefill,
        output / decode,
        held.disk / tokens,
    )
