"""Permuted block-sparse attention against the algorithm written out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from prompts import chunk, density, facts, hot_chunk, recovered, weights

from quire.errors import InvalidRequestError
from quire.kv.method import Entries, Facts
from quire.kv.recipes import parse
from quire.kv.sparse.pbs import PermutedBlocks


def written_out(
    method: PermutedBlocks, known: Facts, q: Tensor, entries: Entries, start: int
) -> list[list[set[int]]]:
    """Block by block, in float64."""
    b, m = method.block, method.segment
    starts = list(range(start, start + len(q), b))
    keys = entries.keys.double()
    order = []
    for head in range(known.kv_heads):
        complete = starts[-1] // m * m
        among = Entries(*(x[:, : max(complete, 1)] for x in (keys, keys, entries.positions)))
        hot = torch.zeros(complete)
        if complete:
            rows = q[-method.rank :].double()
            scores = torch.full((len(rows), known.group, complete), -torch.inf).double()
            for i, row in enumerate(rows):
                at = start + len(q) - len(rows) + i
                for g in range(known.group):
                    for j in range(min(complete, at + 1)):
                        score = row[head * known.group + g] @ among.keys[head, j] * known.scale
                        if known.softcap is not None:
                            score = known.softcap * (score / known.softcap).tanh()
                        scores[i, g, j] = score
            hot = scores.softmax(-1).mean((0, 1))
        places = []
        for first in range(0, complete, m):
            inside = list(range(first, first + m))
            places += sorted(inside, key=lambda j: -hot[j].item()) if method.permute else inside
        order.append(places)
    found = []
    for index, at in enumerate(starts):
        mine = q[index * b : (index + 1) * b].double().mean(0)
        whole = at // m * m
        heads = []
        for head in range(known.kv_heads):
            blocks = [order[head][i : i + b] for i in range(0, whole, b)]
            read = set(range(whole, at))
            for g in range(known.group):
                if not blocks:
                    continue
                query = mine[head * known.group + g]
                scores = torch.stack([keys[head, p].mean(0) @ query for p in blocks]) * known.scale
                if known.softcap is not None:
                    scores = known.softcap * (scores / known.softcap).tanh()
                shares = scores.softmax(0)
                reached = 0.0
                for c in shares.argsort(descending=True).tolist():
                    if reached >= method.threshold:
                        break
                    reached += shares[c].item()
                    read |= set(blocks[c])
            for p in blocks:
                if 0 in p:
                    read |= set(p)
            heads.append(read)
        found.append(heads)
    return found


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("before", "rows", "kv_heads", "group", "softcap"),
    [(64, 32, 2, 1, None), (53, 29, 1, 4, 4.0), (0, 40, 2, 4, None), (7, 8, 1, 1, None)],
)
def test_against_the_algorithm(
    permute: bool,
    dtype: torch.dtype,
    before: int,
    rows: int,
    kv_heads: int,
    group: int,
    softcap: float | None,
) -> None:
    torch.manual_seed(before)
    method = PermutedBlocks(0.7, 4, 8, permute, rank=5)
    known = facts(kv_heads, group, 16, dtype, softcap)
    q, entries = chunk(known, before, rows)
    found = method.choose(known, 0, q, entries, before)
    wanted = written_out(method, known, q, entries, before)
    assert len(found) == -(-rows // 4)
    for b, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        for places, others in zip(mine, theirs, strict=True):
            assert places.dtype == torch.int64
            assert len(set(places.tolist())) == len(places)
            assert set(places.tolist()) == others
            assert all(0 <= p < before + 4 * b for p in others)


@pytest.mark.parametrize("permute", [True, False])
def test_a_threshold_of_one_reads_everything(permute: bool) -> None:
    torch.manual_seed(0)
    known = facts(2, 2, 16, torch.float32)
    q, entries = hot_chunk(known, 100, 50, 8)  # where most shares are lost in rounding
    q = 20 * q
    found = PermutedBlocks(1.0, 4, 8, permute).choose(known, 0, q, entries, 100)
    for b, heads in enumerate(found):
        for places in heads:
            assert sorted(places.tolist()) == list(range(100 + 4 * b))


def test_keys_that_are_all_alike() -> None:
    known = facts(1, 2, 16, torch.float32)
    for value in (0.0, 1.0):
        q, keys = torch.full((24, 2, 16), value), torch.full((1, 64, 16), value)
        entries = Entries(keys, keys, torch.arange(64)[None])
        found = PermutedBlocks(0.5, 4, 8).choose(known, 0, q, entries, 40)
        read = [len(heads[0]) for heads in found]
        # Half of the blocks of complete segments (or, by rounding, one more), and what follows.
        wanted = zip(read, [20, 24, 24, 28, 28, 32], strict=True)
        assert all(n in (least, least + 4) for n, least in wanted)


def test_sorting_reads_less_at_equal_recovered_mass() -> None:
    """Hot keys that lie scattered: what the permutation is for."""
    torch.manual_seed(3)
    known = facts(2, 2, 32, torch.float32)
    method = PermutedBlocks(0.9, 32, 128)
    start, rows = 1024, 256
    q, entries = hot_chunk(known, start, rows, 8)
    shares: dict[bool, dict[float, tuple[float, float]]] = {}
    for permute in (True, False):
        for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
            each = replace(method, threshold=threshold, permute=permute)
            choice = each.choose(known, 0, q, entries, start)
            mass = recovered(known, q, entries, choice, 32)
            share = density(choice, 32, start, rows)
            shares.setdefault(permute, {})[threshold] = share, mass
    share, mass = shares[True][0.9]
    assert share < 0.5
    assert mass > 0.9
    as_good = [s for s, m in shares[False].values() if m >= mass - 0.02]
    assert min(as_good, default=1.0) > 2 * share


def test_importance_is_the_mean_attention_of_the_last_block() -> None:
    torch.manual_seed(4)
    known = facts(2, 4, 16, torch.float32)
    q, entries = chunk(known, 40, 24)
    found = PermutedBlocks(0.9, 8, 16, rank=8).importance(known, q, entries.keys, 40)
    wanted = weights(known, q, entries)[-8:].mean((0, 2))
    torch.testing.assert_close(found.double(), wanted)


def test_how_many_tokens_are_read_without_a_choice() -> None:
    assert PermutedBlocks().least == 256
    assert PermutedBlocks(dense=100).least == 256
    assert PermutedBlocks(dense=4096).least == 4096


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("pbs(threshold=0)", "share"),
        ("pbs(threshold=1.5)", "share"),
        ("pbs(block=100)", "multiple"),
        ("pbs(rank=0)", "rank=0: at least 1"),
        ("pbs(dense=-1)", "dense=-1: at least 0"),
        ("pbs+pbs", "sparse"),
    ],
)
def test_refused(text: str, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        parse(text)
