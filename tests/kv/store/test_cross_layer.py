"""Factors of several layers, from entries to entries, and in the engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "engine"))

from subspaces import entries_of, error, errors, headed, make_facts, rotated, spread
from test_engine import random_requests, run, tokens

from quire import LLM, SamplingParams
from quire.errors import InvalidRequestError
from quire.kv.method import Entries, Facts, Plain, gather
from quire.kv.recipes import parse
from quire.kv.store.cross_layer import CrossLayer, Shared


def cut(x: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def layers_of(
    facts: Facts, n: int, *, rank: int, noise: float = 0.0, alike: bool = True, first: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Entries]]:
    """Straight keys and values ``[n, width]`` of all layers, and the entries."""
    width, at = facts.kv_heads * facts.head_dim, torch.arange(first, first + n)
    keys, values = (
        [
            spread(n, width, rank, noise=noise, seed=kind + i, tokens=kind if alike else None)
            for i in range(facts.layers)
        ]
        for kind in (100, 200)
    )
    both = zip(keys, values, strict=True)
    return keys, values, [entries_of(facts, k, v, at) for k, v in both]


def read(stored: object, layers: int) -> list[Entries]:
    return [stored.read(layer) for layer in range(layers)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("heads", [(1, 1), (2, 4)])
@pytest.mark.parametrize(("layers", "group"), [(2, 2), (5, 2), (3, 4), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_against_the_algorithm(
    heads: tuple[int, int], layers: int, group: int, dtype: torch.dtype
) -> None:
    facts = make_facts(heads[0], layers, 16, dtype, heads[1])
    width = heads[0] * 16
    keys, values, entries = layers_of(facts, 304, rank=width, first=1000)
    method = CrossLayer(group, 0.25, width // 2)
    stored = method.pack(facts, entries)
    assert isinstance(stored, Shared)
    near = {"rtol": 0, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    for first in range(0, layers, group):
        members = range(first, min(first + group, layers))
        key_rank = -(-round(0.25 * group * width) * len(members) // group)
        value_rank = -(-(width // 2) * len(members) // group)
        short_keys = cut(torch.cat([keys[i] for i in members], dim=1), key_rank)
        short_values = cut(torch.cat([values[i] for i in members], dim=1), value_rank)
        for place, layer in enumerate(members):
            mine = slice(place * width, (place + 1) * width)
            found = stored.read(layer)
            at = entries[layer].positions
            wanted = rotated(headed(short_keys[:, mine], heads[0]), at)
            torch.testing.assert_close(found.keys.double(), wanted, **near)
            wanted = headed(short_values[:, mine], heads[0])
            torch.testing.assert_close(found.values.double(), wanted, **near)
            assert torch.equal(found.positions, at)


def test_chosen_entries_are_the_same() -> None:
    facts = make_facts(2, 3)
    _, _, entries = layers_of(facts, 256, rank=40, first=50)
    stored = CrossLayer().pack(facts, entries)
    index = torch.randint(256, (3, 2, 9))
    found, wanted = stored.read(2, index), gather(stored.read(2), index)
    torch.testing.assert_close(found.keys, wanted.keys)
    torch.testing.assert_close(found.values, wanted.values)
    assert torch.equal(found.positions, wanted.positions)


def test_positions_that_are_not_neighbours() -> None:
    """Of each head its own, as after a selection."""
    facts = make_facts(2, 2)
    generator = torch.Generator().manual_seed(0)
    at = torch.stack([torch.randperm(900, generator=generator)[:160].sort().values for _ in "ab"])
    straight = [headed(spread(160, 64, 8, seed=i, tokens=9), 2) for i in range(2)]
    entries = [Entries(rotated(x, at).float(), x, at) for x in straight]
    stored = CrossLayer(2).pack(facts, entries)
    assert isinstance(stored, Shared)
    assert max(errors(read(stored, 2), entries)) < 1e-4
    assert torch.equal(stored.read(1).positions, at)
    index = torch.tensor([[[3, 0], [159, 5]]])
    assert torch.equal(stored.read(1, index).positions, gather(entries[1], index).positions)


def test_what_has_that_rank_is_restored_to_rounding() -> None:
    facts = make_facts(2, 4)
    _, _, entries = layers_of(facts, 400, rank=32)
    stored = CrossLayer().pack(facts, entries)
    assert max(errors(read(stored, 4), entries)) < 1e-4
    # Rotated keys are not of low rank: without turning them back there is nothing to gain.
    turned = make_facts(2, 4)
    object.__setattr__(turned, "turn", lambda _layer, x, _at, _back: x)
    as_they_are = CrossLayer().pack(turned, entries)
    assert errors(read(as_they_are, 4), entries)[0] > 0.1


def test_energy_kept_grows_with_rank() -> None:
    facts = make_facts(2, 4)
    _, _, entries = layers_of(facts, 600, rank=64, noise=0.5, alike=False)
    found = [
        errors(read(CrossLayer(4, share, share).pack(facts, entries), 4), entries)
        for share in (0.05, 0.1, 0.2, 0.4)
    ]
    for less, more in pairwise(found):
        assert more[0] < less[0]
        assert more[1] < less[1]


def test_layers_that_share_tokens_are_better_together() -> None:
    """At equal bytes; and no better where they share nothing."""
    facts = make_facts(2, 4)

    def lost(entries: Sequence[Entries], group: int, share: float) -> tuple[float, int]:
        stored = CrossLayer(group, share, share).pack(facts, entries)
        return errors(read(stored, 4), entries)[0], stored.nbytes

    _, _, alike = layers_of(facts, 1200, rank=32, noise=0.05)
    _, _, apart = layers_of(facts, 1200, rank=32, noise=0.05, alike=False)
    together, single = lost(alike, 4, 0.125), lost(alike, 1, 0.1563)
    assert together[1] <= single[1]
    assert together[0] < 0.1
    assert single[0] > 5 * together[0]
    assert lost(apart, 4, 0.125)[0] > 5 * together[0]


@pytest.mark.parametrize("n", [512, 1024])
def test_bytes(n: int) -> None:
    """A token takes 2.5 of the 16 numbers that it has in 8 layers; the bases come to that."""
    facts = make_facts(2, 8, 16, torch.bfloat16)
    _, _, entries = layers_of(facts, n, rank=16)
    stored = CrossLayer().pack(facts, entries)
    width = 4 * 2 * 16
    ranks = width // 8 + width * 3 // 16
    assert stored.nbytes == 2 * 2 * ranks * (n + width)
    plain = 2 * 2 * 8 * 2 * 16 * n
    assert plain / (2 * 2 * ranks * n) == 6.4


def test_published_ranks() -> None:
    facts = make_facts(8, 32, 128)
    assert CrossLayer().ranks(facts, 4) == (512, 768)
    assert CrossLayer(4, 512, 768).ranks(facts, 4) == (512, 768)
    assert CrossLayer(1, 128, 192).ranks(facts, 1) == (128, 192)
    assert CrossLayer().ranks(facts, 3) == (384, 576)
    assert CrossLayer(4, 7, 1000).ranks(make_facts(1, 3, 8), 3) == (6, 24)


@pytest.mark.slow
def test_bytes_of_a_common_shape() -> None:
    """4,096 tokens of two layers with 8 KV heads of 128."""
    facts = make_facts(8, 2, 128, torch.bfloat16)
    _, _, entries = layers_of(facts, 4096, rank=256)
    stored = CrossLayer(2).pack(facts, entries)
    assert stored.nbytes == 2 * (256 + 384) * (4096 + 2048)
    assert max(errors(read(stored, 2), entries)) < 0.01


@pytest.mark.parametrize("n", [16, 64])
def test_too_short_to_save_anything(n: int) -> None:
    facts = make_facts(2, 4)
    _, _, entries = layers_of(facts, n, rank=4)
    stored = CrossLayer().pack(facts, entries)
    assert isinstance(stored, Plain)
    assert stored.layers == tuple(entries)


def test_all_the_same() -> None:
    facts = make_facts(2, 2)
    at = torch.arange(160).expand(2, -1)
    for x in (torch.zeros(2, 160, 32), torch.full((2, 160, 32), -2.0)):
        entries = [Entries(rotated(x, at).float(), x, at)] * 2
        found = CrossLayer(2).pack(facts, entries).read(1)
        torch.testing.assert_close(found.keys, entries[1].keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.values, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["xkv(group=0)", "xkv(key_rank=0)", "xkv(value_rank=1.5)"])
def test_what_makes_no_sense(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"group|rank"):
        parse(text)


# In the engine.

SMALL = "xkv(group=2,key_rank=0.5,value_rank=0.5)"  # parts of 32 tokens and more


@pytest.mark.parametrize("seed", range(6))
def test_alone_the_plan_changes_nothing(seed: int) -> None:
    for request in random_requests(seed):
        wanted, _ = run([request], recipe=parse(SMALL))
        for chunk in (3, 64):
            found, _ = run([request], recipe=parse(SMALL), chunk=chunk)
            assert tokens(found) == tokens(wanted)


@pytest.mark.parametrize("seed", range(6))
def test_in_company_all_end(seed: int) -> None:
    requests = random_requests(seed)
    for policy in ("batch", "fcfs"):
        found, _ = run(requests, recipe=parse(SMALL), policy=policy, windows=2, pages=60, chunk=16)
        assert len(found) == len(requests)


def test_the_demonstration_model() -> None:
    """Little is lost of a text that is longer than its ranks."""
    story = "It was a dark and stormy night, and the old man sat by the fire. " * 20
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=2)
    outputs = []
    for text in ("none", "xkv(key_rank=0.4,value_rank=0.4)"):
        with LLM("demo", kv=text, kv_memory="64MiB", dtype="float32") as llm:
            outputs.append([o.outputs[1].token_ids for o in llm.generate([story], params)])
    assert error(torch.tensor(outputs[1]), torch.tensor(outputs[0])) == 0
