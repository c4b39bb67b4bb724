from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from quire.bench.kv.cost import OUTPUT, Counting, measure_cost
from quire.bench.kv.forced import Forced, Script, Span
from quire.bench.kv.memory import Held, measure_held, tensor_bytes
from quire.kv.method import Recipe
from quire.kv.recipes import parse
from quire.kv.tiers.mapped import on_disk
from quire.schedule.policies import POLICIES
from toy import ByteTokenizer, MockModel

SLOT = 2 * 2 * 8 * 4  # bytes of a token: keys and values, layers, head_dim, float32


def make(recipe: Recipe, tokens: int) -> Forced:
    return Forced(
        MockModel(),  # type: ignore[arg-type]
        ByteTokenizer(),  # type: ignore[arg-type]
        policy=POLICIES["batch"],
        kv_bytes=(tokens + 200) * SLOT,
        chunk=64,
        recipe=recipe,
    )


def text(length: int, seed: int = 0) -> np.ndarray:
    rng = random.Random(seed)
    return np.array([rng.randrange(1, 256) for _ in range(length)], dtype=np.int32)


def held_at_the_end(recipe: str, prompt: int, output: int) -> tuple[Held, Forced]:
    engine = make(parse(recipe), prompt + output)
    tokens = text(prompt + output)
    engine.begin([Script(tokens[:prompt], tokens[prompt:], (Span(0, output),))])
    found = Held(0, 0, 0)
    while engine.unfinished:
        found = measure_held(engine)
        engine.step()
    return found, engine


def test_all_tensors_are_found_once() -> None:
    @dataclass
    class Box:
        content: object

    x = torch.zeros(10, 10)
    assert tensor_bytes(x, set()) == 400
    assert tensor_bytes([x, x[2:5], {"a": x.T}], set()) == 400
    assert tensor_bytes(x[3], set()) == 400  # a part keeps all of it in memory
    assert tensor_bytes(x.expand(5, 10, 10), set()) == 400
    assert tensor_bytes(Box((Box(x), Box(torch.zeros(3)))), set()) == 412
    assert tensor_bytes(np.zeros(7)[2:], set()) == 56
    assert tensor_bytes([None, "text", 3, print, Box, Box(Box(None))], set()) == 0
    both = [x, on_disk(torch.zeros(50)), np.zeros(7)]
    assert tensor_bytes(both, set()) == 456
    assert tensor_bytes(both, set(), disk=True) == 200


def test_pages_in_use_are_counted() -> None:
    held, _ = held_at_the_end("none", 100, 20)
    assert held == Held((112 + 32) * SLOT, 0, 0)


def test_a_selection_holds_what_it_keeps_and_where_it_was() -> None:
    held, engine = held_at_the_end("snapkv(budget=32,window=4)", 200, 20)
    assert held.kv == (32 + 32) * SLOT
    assert held.index == 0
    assert 32 * 2 * 4 <= held.notes <= 32 * 2 * 16  # two layers, positions of 4 or 8 bytes
    assert engine.world.pool.used_pages == 0


def test_packed_entries_count_by_their_tensors() -> None:
    held, _ = held_at_the_end("kivi(bits=2,residual=32)", 160, 20)
    codes = 2 * 2 * 160 * 2  # two bits for eight numbers of keys and values in two layers
    scales = 2 * 2 * 4 * (8 * 160 // 32 + 160)
    positions = 2 * 8 * 160
    assert held.kv - 32 * SLOT == pytest.approx(codes + scales + positions, abs=positions)


def test_cost() -> None:
    texts = [text(200 + OUTPUT, seed) for seed in range(3)]
    whole = measure_cost(make, parse("none"), texts, 1)
    assert whole.held_per_token == pytest.approx(SLOT, rel=0.1)
    assert whole.read_per_token == whole.held_per_token
    assert whole.peak_bytes >= 3 * (200 + OUTPUT - 1) * SLOT
    assert whole.prefill_per_second > 0
    assert whole.decode_per_second > 0
    part = measure_cost(make, parse("snapkv(budget=50,window=4)"), texts, 2)
    assert part.held_per_token < 0.6 * SLOT
    assert part.read_per_token == part.held_per_token
    assert part.peak_bytes < whole.peak_bytes
    fetching = "landmarks(budget=16,chunk=4,outliers=2,local=2)"
    some = measure_cost(make, parse(fetching), texts, 1)
    assert some.held_per_token > SLOT
    # 16 + 2 * 4 + 2 * 4 of the prompt, the tail, and the means of 48 chunks.
    tail = OUTPUT * SLOT  # grown to, and so more than is read on average
    read = 32 * SLOT + tail + 48 * SLOT / 2
    assert some.read_per_token * (200 + OUTPUT) == pytest.approx(read, rel=0.25)


def test_what_is_counted_is_what_is_chosen() -> None:
    recipe = parse("landmarks(budget=16,chunk=4,outliers=0,local=1)")
    assert recipe.fetch is not None
    count = Counting(recipe.fetch)
    engine = make(Recipe(fetch=count), 300)
    tokens = text(130)
    engine.follow([Script(tokens[:100], tokens[100:], (Span(0, 30),))])
    steps, layers = 29, 2
    assert count.offered == steps * layers * 100
    assert count.chosen == steps * layers * (16 + 4)
