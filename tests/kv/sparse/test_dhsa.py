"""Hierarchical sparse attention against the algorithm written out."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from prompts import chunk, density, facts, recovered

from quire.errors import InvalidRequestError
from quire.kv.method import Entries, Facts
from quire.kv.recipes import parse
from quire.kv.sparse.dhsa import Hierarchical


def cuts(method: Hierarchical, known: Facts, entries: Entries) -> list[int]:
    """The edges of chunks, boundary by boundary."""
    size = len(entries)
    if method.boundaries == "fixed":
        return [*range(0, size, method.chunk), size]
    keys = known.unrotate(0, entries.keys.double(), entries.positions)
    flat = torch.stack([keys[:, t].flatten() for t in range(size)])
    unlike = {}
    for at in range(4, size - 3):
        left, right = flat[at - 4 : at].mean(0), flat[at : at + 4].mean(0)
        unlike[at] = 1 - torch.dot(left, right) / (left.norm() * right.norm())
    peaks = [
        at
        for at, value in unlike.items()
        if all(value >= unlike[t] for t in range(at - 4, at + 5) if t in unlike)
    ]
    peaks.sort(key=lambda at: -unlike[at])
    return sorted([0, size, *peaks[: size // method.chunk]])


def written_out(
    method: Hierarchical, known: Facts, q: Tensor, entries: Entries, start: int
) -> list[list[set[int]]]:
    """Block by block, token by token, in float64."""
    edges = cuts(method, known, entries)
    found = []
    for low in range(0, len(q), method.block):
        rows = q[low : low + method.block].double()
        at, end = start + low, start + low + len(rows)
        newest = set(range(max(0, end - method.newest), end)) | set(range(at, end))
        always = newest | {t for t in range(method.first) if t < min(newest)}
        chunks = [
            [t for t in range(a, b) if t < end and t not in always] for a, b in pairwise(edges)
        ]
        heads = []
        for kv_head in range(known.kv_heads):
            mine = range(known.kv_heads) if method.shared else [kv_head]
            asking = [g for h in mine for g in range(h * known.group, (h + 1) * known.group)]
            query = rows[:, asking].mean((0, 1)) * len(rows) ** 0.5
            ranked = []
            for tokens in filter(None, chunks):
                mean = torch.stack([entries.keys[list(mine), t].double().mean(0) for t in tokens])
                length = len(tokens) ** 0.5 if method.normalise else 1
                ranked.append((-(query @ mean.mean(0) * length).item(), tokens))
            read = set(always)
            for _, tokens in sorted(ranked):
                for t in tokens:
                    if len(read) < method.budget:
                        read.add(t)
            heads.append({t for t in read if t < at})
        found.append(heads)
    return found


METHODS = [
    Hierarchical(24, 6, first=4, newest=7, block=4),
    Hierarchical(24, 6, "similar", first=4, newest=3, block=4),
    Hierarchical(30, 5, "similar", first=0, newest=0, block=8, shared=False),
    Hierarchical(33, 8, first=9, newest=12, block=4, normalise=False, shared=False),
    Hierarchical(3, 8, first=2, newest=6, block=4),  # a budget less than what is always read
]


@pytest.mark.parametrize("method", METHODS, ids=range(len(METHODS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("before", "rows", "kv_heads", "group"), [(61, 30, 2, 1), (0, 45, 1, 4), (3, 8, 2, 4)]
)
def test_against_the_algorithm(
    method: Hierarchical, dtype: torch.dtype, before: int, rows: int, kv_heads: int, group: int
) -> None:
    torch.manual_seed(before)
    known = facts(kv_heads, group, 16, dtype)
    # Boundaries are found among keys that are turned back, here by stretching some.
    known = replace(known, turn=lambda _l, x, at, back: x * (1 + at[..., None] % 3) if back else x)
    q, entries = chunk(known, before, rows)
    found = method.choose(known, 0, q, entries, before)
    wanted = written_out(method, known, q, entries, before)
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        for places, others in zip(mine, theirs, strict=True):
            assert places.dtype == torch.int64
            assert places.tolist() == sorted(others)


def test_a_budget_for_all_reads_everything() -> None:
    torch.manual_seed(0)
    known = facts(2, 2, 16, torch.float32)
    q, entries = chunk(known, 100, 50)
    found = Hierarchical(150, 8, block=16).choose(known, 0, q, entries, 100)
    for b, heads in enumerate(found):
        assert all(places.tolist() == list(range(100 + 16 * b)) for places in heads)


@pytest.mark.parametrize("boundaries", ["fixed", "similar"])
def test_keys_that_are_all_alike(boundaries: str) -> None:
    known = facts(1, 2, 16, torch.float32)
    for value in (0.0, 1.0):
        q, keys = torch.full((20, 2, 16), value), torch.full((1, 120, 16), value)
        entries = Entries(keys, keys, torch.arange(120)[None])
        method = Hierarchical(40, 8, boundaries, 4, 4, block=8)
        found = method.choose(known, 0, q, entries, 100)
        assert [len(heads[0]) for heads in found] == [32, 32, 36]


def topics(known: Facts, tokens: int) -> tuple[Tensor, Tensor, list[int]]:
    """Keys in runs of one topic each, 20 to 90 tokens long; where the runs begin."""
    starts, kinds = [0], []
    while starts[-1] < tokens:
        starts.append(starts[-1] + int(torch.randint(20, 90, (1,))))
        kinds.append(torch.randn(known.kv_heads, 1, known.head_dim))
    lengths = [b - a for a, b in pairwise(starts)]
    means = torch.cat([k.expand(-1, n, -1) for k, n in zip(kinds, lengths, strict=True)], dim=1)
    keys = means[:, :tokens] + 0.3 * torch.randn(known.kv_heads, tokens, known.head_dim)
    return keys, torch.stack(kinds), starts


def test_boundaries_are_found_and_help() -> None:
    """Text in topics: chunks that end with them recover more than chunks of one length."""
    torch.manual_seed(2)
    known = facts(2, 2, 32, torch.float32)
    start, rows = 1800, 128
    keys, kinds, starts = topics(known, start + rows)
    entries = Entries(keys, torch.randn_like(keys), torch.arange(start + rows).expand(2, -1))
    similar = Hierarchical(512, 54, "similar", 16, 16, block=32)
    edges = set(similar.edges(known, 0, entries).tolist())
    inner = [s for s in starts[1:] if s < start + rows - 4]
    assert sum(s in edges for s in inner) > 0.8 * len(inner)
    asked = kinds[torch.arange(rows) // 32, :, 0]  # each block looks for one of the first topics
    q = (5 * asked + 0.3 * torch.randn(rows, 2, 32)).repeat_interleave(2, 1)
    mass, share = {}, {}
    for boundaries in ("fixed", "similar"):
        method = replace(similar, boundaries=boundaries, budget=200)
        choice = method.choose(known, 0, q, entries, start)
        mass[boundaries] = recovered(known, q, entries, choice, 32)
        share[boundaries] = density(choice, 32, start, rows)
    assert share["similar"] == share["fixed"] < 0.15
    assert mass["similar"] > 0.9
    assert mass["similar"] > mass["fixed"] + 0.01


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("dhsa(budget=0)", "budget"),
        ("dhsa(tail=-1)", "tail=-1: at least 0"),
        ("dhsa(boundaries=learned)", "similar"),
        ("dhsa+pbs", "sparse"),
    ],
)
def test_refused(text: str, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        parse(text)
