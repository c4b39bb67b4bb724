"""SparF against the algorithm in loops; channels, pages, tiers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clustered import SHAPES, Node, at_random, attention, chosen, mass
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kv.fetch.sparf import Channels, LoudChannels
from toy import make_facts

SMALL = LoudChannels(budget=20, channels=8, page=4, recent=10)


def made(node: Node, method: LoudChannels = SMALL) -> Channels:
    index = node.index(method)
    assert isinstance(index, Channels)
    return index


def shares(node: Node, layer: int, q: Tensor, head: int, rank: int) -> list[float] | None:
    """Of one row ``[heads, head_dim]``: the best share of each token, loops over channels.

    None where channels are as loud as each other, and either may be read.
    """
    group = node.facts.group
    rows = q[head * group : (head + 1) * group].double()
    loudness = [float(rows[:, c].abs().sum()) for c in range(rows.shape[1])]
    loud = sorted(range(len(loudness)), key=lambda c: -loudness[c])
    if loudness[loud[rank - 1]] <= loudness[loud[rank]] * (1 + 1e-6):
        return None
    loud = loud[:rank]
    best = [0.0] * node.n
    for row in rows:
        said = sum(abs(float(row[c])) for c in loud) / float(row.abs().sum())
        temperature = math.sqrt(len(row) * said)
        keys = node.entries[layer].keys[head].double()
        scores = sum(row[c] * keys[:, c] for c in loud) / temperature
        best = [max(a, b) for a, b in zip(best, scores.softmax(-1).tolist(), strict=True)]  # type: ignore[union-attr]
    return best


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("rows", [1, 9])  # channels are read alone, or all of them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_against_the_algorithm(heads: int, kv_heads: int, rows: int, dtype: torch.dtype) -> None:
    node = Node(make_facts(heads, kv_heads, dtype=dtype), 203, noise=1.0)
    q = node.rows(1, rows)
    found = chosen(made(node).choose(1, q))
    newest = set(range(193, 203))
    compared = 0
    for row in range(rows):
        for head in range(kv_heads):
            score = shares(node, 1, q[row], head, 8)
            if score is None:
                continue
            compared += 1
            old = sorted(range(193), key=lambda t: -score[t])
            best = old[:20]
            # Many bfloat16 rows are scored in bfloat16.
            near = 1.2 if dtype == torch.bfloat16 and rows > 1 else 1 + 1e-5
            sure = {t // 4 for t in best if score[t] > score[old[20]] * near}
            maybe = {t // 4 for t in old if score[t] > score[best[-1]] / near}
            read = set(found[row][head])
            assert newest | {t for t in range(203) if t // 4 in sure} <= read
            assert read <= newest | {t for t in range(203) if t // 4 in maybe}
    assert compared >= 0.8 * rows * kv_heads


def test_few_rows_read_as_many_rows_do() -> None:
    node = Node(make_facts(), 300)
    index = made(node)
    q = node.rows(0, 9)
    together = index.shares(0, q)
    alone = torch.cat([index.shares(0, row[None]) for row in q])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_all_channels_give_the_exact_shares() -> None:
    node = Node(make_facts(8, 2), 150)
    q = node.rows(1, 3)
    found = made(node, replace(SMALL, channels=1.0)).shares(1, q)
    exact = attention(node.facts, node.entries[1], q).unflatten(1, (2, 4)).amax(2)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)


def test_more_of_the_attention_than_a_random_choice() -> None:
    node = Node(make_facts(8, 2, head_dim=64), 1000, topics=30)
    q = node.rows(0, 8)
    found = chosen(made(node, LoudChannels(budget=64)).choose(0, q))
    share = mass(node.facts, node.entries[0], q, found)
    assert share > 0.7
    assert mass(node.facts, node.entries[0], q, at_random(found, 1000)) < share / 2


def test_loud_channels_are_the_ones_to_read() -> None:
    """Where queries have outliers; the same number of other channels tells less."""
    node = Node(make_facts(4, 2, head_dim=64), 600, topics=20, noise=1.0)
    q = node.rows(0, 8)
    loud = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:8]
    q[..., loud] *= 4
    index = made(node, replace(SMALL, channels=8, page=1))
    found = chosen(index.choose(0, q))
    blind = q.clone()
    blind[..., loud] = 0
    others = chosen(index.choose(0, blind))
    missed = 1 - mass(node.facts, node.entries[0], q, found)
    assert missed < 0.5 * (1 - mass(node.facts, node.entries[0], q, others))


@pytest.mark.parametrize("page", [1, 16])
def test_budgets(page: int) -> None:
    node = Node(make_facts(), 500, topics=30)
    method = replace(SMALL, page=page)
    found = chosen(made(node, method).choose(0, node.rows(0, 4)))
    for heads in found:
        for one in heads:
            assert 30 <= len(one) <= 20 * page + 10
            if page == 1:
                assert len(one) == 30


def test_heads_of_different_lengths() -> None:
    node = Node(make_facts(), 300)
    node.cut([300, 150])
    for rows in (1, 9):
        for heads in chosen(made(node).choose(0, node.rows(0, rows))):
            assert set(range(290, 300)) <= set(heads[0])
            assert max(heads[1]) == 149
            assert set(range(140, 150)) <= set(heads[1])
            assert len(heads[1]) >= 30


def test_few_or_equal_tokens() -> None:
    assert Node(make_facts(), 30).maybe(SMALL) is None
    node = Node(make_facts(), 31)
    for entries in node.entries:
        entries.keys.fill_(1.0)
    for q in (node.rows(0, 2), torch.zeros(2, 4, 32)):
        found = chosen(made(node).choose(0, q))
        assert all(len(one) >= 30 for heads in found for one in heads)


def test_on_disk(tmp_path: Path) -> None:
    node = Node(make_facts(), 300)
    ram, disk = made(node), made(node, replace(SMALL, tier="disk", folder=str(tmp_path)))
    assert disk.nbytes == 2 * 2 * 8  # counts alone
    assert ram.nbytes == disk.nbytes + 2 * 2 * 300 * 32 * 4
    for rows in (1, 9):
        q = node.rows(1, rows)
        assert torch.equal(ram.choose(1, q).chunks, disk.choose(1, q).chunks)


def test_bytes() -> None:
    """A copy of the keys: half of what keys and values take."""
    n = 4096
    node = Node(make_facts(8, 8, head_dim=128, dtype=torch.bfloat16), n)
    index = made(node, LoudChannels())
    assert index.nbytes == 2 * (8 * n * 128 * 2 + 8 * 8)
    assert index.rank == 16
    assert index.count == 256


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0},
        {"channels": 1.5},
        {"page": 0},
        {"tier": "tape"},
        {"tier": "disk", "folder": "/nowhere"},
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        LoudChannels(**wrong)  # type: ignore[arg-type]
