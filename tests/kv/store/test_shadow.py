"""ShadowKV's store against the algorithm written out, its bytes, and the recipe in the engine."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subspaces import entries_of, error, headed, make_facts, rotated, spread
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "engine"))

from test_engine import PAGE_BYTES, pages_needed, random_requests, run, tokens
from test_recipes import FetchAll, long_request

from quire import LLM, SamplingParams
from quire.bench.kv.memory import measure_held
from quire.engine.engine import Engine
from quire.errors import InvalidRequestError
from quire.kv.fetch.landmarks import Chunks, Landmarks
from quire.kv.method import Chosen, Entries, Facts, Plain, Recipe, gather
from quire.kv.recipes import parse
from quire.kv.store.shadow import LowRankKeys, Shadow, shadowkv
from quire.kv.tiers.mapped import is_on_disk
from quire.schedule.policies import POLICIES
from toy import ByteTokenizer, MockModel


def unasked(_layer: int) -> Tensor:
    raise AssertionError("landmarks look at no queries")


def layers_of(
    facts: Facts, n: int, rank: int, noise: float = 0.0, *, odd: int = 0, first: int = 0
) -> tuple[list[Tensor], list[Entries]]:
    """Straight keys of all layers and the entries; in each head ``odd`` chunks of 8 are noise."""
    width = facts.kv_heads * facts.head_dim
    keys = []
    for layer in range(facts.layers):
        x = spread(n, width, rank, noise=noise, seed=layer) + 1  # neighbours are somewhat alike
        generator = torch.Generator().manual_seed(layer)
        chunks = torch.randperm(max(0, n // 8 - 4), generator=generator)[:odd]
        for chunk in chunks.tolist():
            x[8 * chunk : 8 * chunk + 8] = 3 * torch.randn(8, width, generator=generator)
        keys.append(x)
    at = torch.arange(first, first + n)
    values = [torch.randn(n, width, generator=torch.Generator().manual_seed(9)) for _ in keys]
    return keys, [entries_of(facts, k, v, at) for k, v in zip(keys, values, strict=True)]


def packed(method: LowRankKeys, facts: Facts, layers: list[Entries]) -> Shadow:
    stored = method.pack(facts, layers)
    assert isinstance(stored, Shadow)
    return stored


@pytest.mark.parametrize("heads", [(1, 1), (2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("values", ["disk", "ram"])
@pytest.mark.parametrize(("chunk", "outliers", "local"), [(8, 3, 2), (4, 0, 1), (1, 5, 0)])
def test_against_the_algorithm(
    heads: tuple[int, int],
    dtype: torch.dtype,
    values: str,
    chunk: int,
    outliers: int,
    local: int,
) -> None:
    facts = make_facts(heads[0], 2, 32, dtype, heads[1])
    straight, entries = layers_of(facts, 368, 40, 0.2, first=70)
    method = LowRankKeys(0.25, chunk, outliers, local, values)
    stored = packed(method, facts, entries)
    near = {"rtol": 0, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}
    for layer in range(2):
        u, s, v = torch.linalg.svd(straight[layer].double(), full_matrices=False)
        rank = heads[0] * 32 // 4
        short = headed((u[:, :rank] * s[:rank]) @ v[:rank], heads[0])
        wanted = rotated(short, entries[layer].positions)
        found = stored.read(layer)
        for head in range(heads[0]):
            keys = entries[layer].keys[head].double()
            chunks = 368 // chunk - local
            alike = []
            for c in range(chunks):
                part = keys[c * chunk : (c + 1) * chunk]
                alike.append(torch.cosine_similarity(part, part.mean(0)[None], dim=-1).min())
            odd = torch.stack(alike).argsort(stable=True)[:outliers].tolist() if outliers else []
            exact = {c * chunk + i for c in odd for i in range(chunk)}
            exact |= set(range(chunks * chunk, 368))
            if chunk > 1:  # one key is its own mean: no order
                assert set(stored.exact[layer].places[head].tolist()) == exact
            places = stored.exact[layer].places[head].long()
            assert places.tolist() == sorted(set(places.tolist()))
            wanted[head, places] = keys[places]
            assert torch.equal(found.keys[head, places], entries[layer].keys[head, places].float())
        torch.testing.assert_close(found.keys.double(), wanted, **near)
        assert torch.equal(found.values, entries[layer].values)
        assert torch.equal(found.positions, entries[layer].positions)


@pytest.mark.parametrize("values", ["disk", "ram"])
@pytest.mark.parametrize(("outliers", "local"), [(3, 2), (0, 0)])
def test_chosen_entries_are_the_same(values: str, outliers: int, local: int) -> None:
    facts = make_facts(3, 2)
    _, entries = layers_of(facts, 256, 30, 0.1, first=11)
    stored = packed(LowRankKeys(0.2, 8, outliers, local, values), facts, entries)
    for shape in ((4, 3, 50), (1, 3, 1), (2, 3, 0), (1, 3, 300)):
        index = torch.randint(256, shape, generator=torch.Generator().manual_seed(1))
        found, wanted = stored.read(1, index), gather(stored.read(1), index)
        torch.testing.assert_close(found.keys, wanted.keys)
        assert torch.equal(found.values, wanted.values)
        assert torch.equal(found.positions, wanted.positions)
        assert not is_on_disk(found.values)


def test_positions_that_are_not_neighbours() -> None:
    facts = make_facts(2, 1)
    generator = torch.Generator().manual_seed(0)
    at = torch.stack([torch.randperm(900, generator=generator)[:160].sort().values for _ in "ab"])
    x = headed(spread(160, 64, 8), 2)
    entries = Entries(rotated(x, at).float(), x, at)
    stored = packed(LowRankKeys(outliers=1), facts, [entries])
    assert error(stored.read(0).keys, entries.keys) < 1e-4
    assert torch.equal(stored.read(0).positions, at)
    index = torch.tensor([[[3, 0], [159, 5]]])
    found = stored.read(0, index)
    torch.testing.assert_close(found.keys, gather(entries, index).keys, rtol=0, atol=1e-4)
    assert torch.equal(found.positions, gather(entries, index).positions)


def test_error_falls_with_rank_and_with_exact_outliers() -> None:
    facts = make_facts(2, 1)
    _, entries = layers_of(facts, 800, 16, 0.05, odd=6)
    truth = entries[0].keys

    def lost(rank: float, outliers: int) -> float:
        found = packed(LowRankKeys(rank, 8, outliers), facts, entries).read(0).keys
        return error(found, truth)

    by_rank = [lost(rank, 0) for rank in (0.1, 0.2, 0.4)]
    assert all(more < less for less, more in pairwise(by_rank))
    # The tokens that fit in no small space are those kept as they are.
    assert lost(0.3, 6) < 0.5 * lost(0.3, 0)
    assert lost(0.3, 6) < 0.12


def test_landmarks_are_nearly_those_of_exact_keys() -> None:
    """And what they always read is what the store has exactly."""
    facts = make_facts(2, 1, group=2)
    _, entries = layers_of(facts, 800, 8, 0.02, odd=3)
    stored = packed(LowRankKeys(outliers=3), facts, entries)
    method = Landmarks(budget=128, outliers=3)
    none = np.zeros(0, dtype=np.int32)
    found, wanted = (
        method.index(facts, read, none, unasked) for read in (stored.read, entries.__getitem__)
    )
    assert isinstance(found, Chunks)
    assert isinstance(wanted, Chunks)
    q = torch.randn(20, 4, 32)
    always, _ = Chosen(found.choose(0, q, 3), 8).places(800)
    assert all(torch.equal(row, stored.exact[0].places.long()) for row in always)
    common = set(found.choose(0, q, 3).flatten().tolist())
    same = [
        len((set(a.tolist()) & set(b.tolist())) - common) / 16
        for mine, theirs in zip(found.choose(0, q, 19), wanted.choose(0, q, 19), strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    assert sum(same) / len(same) > 0.9


@pytest.mark.parametrize("n", [1024, 2048])
def test_bytes(n: int) -> None:
    """A token takes 40 bytes for a key and 32 for landmarks of 512: 7.1 times less RAM."""
    facts = make_facts(4, 2, 32, torch.bfloat16)
    _, entries = layers_of(facts, n, 16)
    stored = packed(LowRankKeys(outliers=4), facts, entries)
    exact = 4 * (4 * 8 + 4 * 8)
    fixed = 20 * 128 * 2 + exact * (2 * 32 * 2 + 4)  # the basis; keys, values and places
    assert stored.nbytes == 2 * (40 * n + fixed)
    assert stored.disk_bytes == 2 * 4 * n * 32 * 2
    index = Landmarks(budget=64, outliers=4).index(
        facts, stored.read, np.zeros(0, np.int32), unasked
    )
    assert isinstance(index, Chunks)
    means = sum(x.nbytes for x in index.means)
    assert means == 2 * -(-(n // 8 - 4) // 16) * 16 * 128 * 2
    assert means == pytest.approx(2 * 32 * n, rel=0.05)
    assert pytest.approx(7.1, abs=0.02) == 512 / (40 + 32)
    ram = packed(LowRankKeys(outliers=4, values="ram"), facts, entries)
    assert ram.disk_bytes == 0
    assert ram.nbytes == stored.nbytes + stored.disk_bytes - 2 * exact * 32 * 2


@pytest.mark.slow
def test_bytes_of_a_common_shape() -> None:
    """4,096 tokens of two layers with 8 KV heads of 128, at the published settings."""
    facts = make_facts(8, 2, 128, torch.bfloat16)
    _, entries = layers_of(facts, 4096, 150)
    stored = packed(LowRankKeys(), facts, entries)
    assert stored.keys[0].features.shape == (4096, 160)
    exact = 8 * (48 + 4) * 8
    assert stored.nbytes == 2 * (320 * (4096 + 1024) + exact * (2 * 128 * 2 + 4))
    assert stored.disk_bytes == 2 * 2048 * 4096
    assert error(stored.read(1).keys, entries[1].keys) < 0.01


@pytest.mark.parametrize("n", [16, 48])
def test_too_short_to_save_anything(n: int) -> None:
    facts = make_facts(2, 2)
    _, entries = layers_of(facts, n, 4)
    for values in ("disk", "ram"):
        stored = LowRankKeys(values=values).pack(facts, entries)
        assert isinstance(stored, Plain)
        assert stored.layers == tuple(entries)


def test_all_the_same() -> None:
    facts = make_facts(2, 1)
    at = torch.arange(256).expand(2, -1)
    for x in (torch.zeros(2, 256, 32), torch.full((2, 256, 32), -2.0)):
        entries = Entries(rotated(x, at).float(), x, at)
        stored = packed(LowRankKeys(outliers=2), facts, [entries])
        torch.testing.assert_close(stored.read(0).keys, entries.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("shadowkv(rank=0)", "rank"),
        ("lowrank(values=tape)", "tape"),
        ("lowrank(folder=/nowhere/at/all)", "/nowhere/at/all"),
        ("lowrank(chunk=0)", "chunk"),
        ("lowrank(local=-1)", "local"),
        ("lowrank(outliers=-1)", "outliers"),
        ("shadowkv+kivi", "store"),
        ("shadowkv+landmarks", "fetch"),
    ],
)
def test_what_makes_no_sense(text: str, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        parse(text)


def test_the_recipe(tmp_path: Path) -> None:
    recipe = parse(f"shadowkv(budget=64,rank=160,folder={tmp_path})")
    assert recipe.store == LowRankKeys(160, folder=str(tmp_path))
    assert recipe.fetch == Landmarks(64)
    assert parse("shadowkv") == Recipe("shadowkv", store=LowRankKeys(), fetch=Landmarks())
    assert shadowkv(outliers=3).fetch == Landmarks(outliers=3)
    assert parse("snapkv+shadowkv").select is not None


# In the engine.

WHOLE = LowRankKeys(1.0, 4, 1, 1)  # full rank: parts of 48 tokens and more


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fetch", [None, FetchAll()], ids=["all", "chosen"])
def test_full_rank_changes_nothing(seed: int, fetch: Any) -> None:
    requests = random_requests(seed)
    wanted, _ = run(requests)
    pages = max(map(pages_needed, requests)) + 2
    for policy in ("batch", "fcfs"):
        recipe = Recipe(store=WHOLE, fetch=fetch)
        found, _ = run(requests, recipe=recipe, policy=policy, pages=pages, chunk=16, windows=2)
        assert tokens(found) == tokens(wanted)


def test_memory_goes_to_disk_and_files_go_with_their_sequence() -> None:
    engine = Engine(
        MockModel(),  # type: ignore[arg-type]
        ByteTokenizer(),  # type: ignore[arg-type]
        policy=POLICIES["batch"],
        kv_bytes=100 * PAGE_BYTES,
        chunk=64,
        recipe=parse("shadowkv(budget=32,rank=0.25,chunk=4,outliers=2)"),
    )
    engine.add([long_request(0, 400, 15)])
    held = []
    while engine.unfinished:
        engine.step()
        held.append(measure_held(engine))
    disk = [one.disk for one in held]
    assert max(disk) == disk[-2] == 2 * 400 * 8 * 4
    assert disk[-1] == 0
    assert held[-2].kv < 0.5 * max(one.kv for one in held)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exact", "text"),
    [
        ("none", "lowrank(outliers=2)"),
        ("landmarks(budget=128,outliers=2)", "shadowkv(budget=128,outliers=2)"),
    ],
)
def test_the_demonstration_model(exact: str, text: str) -> None:
    """Writes with keys of low rank what it writes with exact ones, chosen or not."""
    story = "It was a dark and stormy night, and the old man sat by the fire. " * 30
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=2)
    outputs = []
    for kv in (exact, text):
        with LLM("demo", kv=kv, kv_memory="64MiB", dtype="float32") as llm:
            outputs.append([o.outputs[1].token_ids for o in llm.generate([story], params)])
    assert outputs[1] == outputs[0]
