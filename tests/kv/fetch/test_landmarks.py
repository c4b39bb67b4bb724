"""Landmarks against the algorithm written out, with PyTorch and with every instruction set."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from instruction_sets import NAMES, using

from quire.kv.fetch.landmarks import Chunks, Landmarks
from quire.kv.method import Asked, Chosen, Entries, Facts
from toy import make_facts


def facts(heads: tuple[int, int], dim: int, dtype: torch.dtype) -> Facts:
    kv_heads, group = heads
    return make_facts(kv_heads * group, kv_heads, 2, dim, dtype)


def unasked(_layer: int) -> torch.Tensor:
    raise AssertionError("no queries are needed")


def entries(n: int, heads: int, dim: int, dtype: torch.dtype) -> Entries:
    keys, values = torch.randn(2, heads, n, dim).to(dtype)
    return Entries(keys, values, torch.arange(n).expand(heads, n))


def index_of(
    method: Landmarks, n: int, heads: tuple[int, int], dim: int, dtype: torch.dtype
) -> tuple[Chunks, list[Entries]]:
    layers = [entries(n, heads[0], dim, dtype) for _ in range(2)]
    known = facts(heads, dim, dtype)
    index = method.index(known, layers.__getitem__, np.zeros(n, dtype=np.int32), unasked)
    assert isinstance(index, Chunks)
    return index, layers


@pytest.mark.parametrize("isa", ["plain", *NAMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("heads", "dim"), [((1, 1), 16), ((2, 4), 64), ((3, 3), 48)])
@pytest.mark.parametrize(("n", "chunk", "budget"), [(150, 8, 40), (331, 4, 100), (64, 2, 20)])
def test_against_the_algorithm(
    isa: str,
    dtype: torch.dtype,
    heads: tuple[int, int],
    dim: int,
    n: int,
    chunk: int,
    budget: int,
) -> None:
    torch.manual_seed(n + dim)
    method = Landmarks(budget=budget, chunk=chunk, outliers=3, local=2)
    index, layers = index_of(method, n, heads, dim, dtype)
    kv_heads, group = heads
    rows = torch.randn(4, kv_heads * group, dim + 8).to(dtype)
    q = rows.flatten(1)[:, : kv_heads * group * dim].unflatten(1, (-1, dim))
    with using(isa):
        (result,) = method.choose(1, q, [], [Asked(0, 4, index, n)])
    assert result.mask is None
    assert (result.chunks.diff(dim=-1) > 0).all()
    places, mask = result.places(n)
    chunks = n // chunk - 2
    for row in range(4):
        for head in range(kv_heads):
            keys = layers[1].keys[head].double()
            parts = keys[: chunks * chunk].unflatten(0, (chunks, chunk))
            means = parts.mean(1)
            cosines = torch.cosine_similarity(parts, means[:, None], dim=-1).amin(-1)
            odd = set(cosines.argsort()[:3].tolist())
            usual = [c for c in range(chunks) if c not in odd]
            queries = q[row, head * group : (head + 1) * group].double()
            rounded = means.to(dtype).double()  # what the index keeps
            scores = queries @ rounded[usual].T * dim**-0.5
            shares = scores.softmax(-1).amax(0)
            there = slice(None) if mask is None else mask[row, head]
            found = places[row, head, there].tolist()
            assert len(set(found)) == len(found)
            assert len(found) == budget // chunk * chunk + 3 * chunk + n - chunks * chunk
            always = {c * chunk + i for c in odd for i in range(chunk)}
            always |= set(range(chunks * chunk, n))
            assert always <= set(found)
            taken = {p // chunk for p in set(found) - always}
            assert {c * chunk + i for c in taken for i in range(chunk)} == set(found) - always
            share = dict(zip(usual, shares.tolist(), strict=True))
            worst = min(share[c] for c in taken)
            best_left = max((share[c] for c in usual if c not in taken), default=0.0)
            assert worst >= best_left * (1 - 1e-5)


@pytest.mark.parametrize("isa", ["plain", *NAMES])
def test_equals_and_numbers_without_order(isa: str) -> None:
    """As many as asked for, each once, also where nothing tells chunks apart."""
    method = Landmarks(budget=40, chunk=8, outliers=1, local=1)
    index, _ = index_of(method, 200, (1, 2), 32, torch.float32)
    for q in (torch.zeros(1, 2, 32), torch.full((1, 2, 32), torch.nan)):
        with using(isa):
            (found,) = method.choose(0, q, [], [Asked(0, 1, index, 200)])
        chunks = found.chunks[0, 0].tolist()
        assert len(chunks) == 5 + 1 + 1
        assert len(set(chunks)) == len(chunks)
        assert all(0 <= chunk < 25 for chunk in chunks)
        assert set(index.always[0].nonzero()[:, 1].tolist()) | {24} <= set(chunks)


@pytest.mark.parametrize("isa", ["plain", *NAMES])
@pytest.mark.parametrize("local", [0, 2])
def test_several_nodes_at_once(isa: str, local: int) -> None:
    """Of different lengths, one of them for two ranges of rows; with nothing left over, too."""
    torch.manual_seed(0)
    method = Landmarks(budget=40, chunk=4, outliers=3, local=local)
    indexes = [index_of(method, n, (2, 3), 32, torch.bfloat16)[0] for n in (150, 1031, 64)]
    q = torch.randn(70, 6, 32).bfloat16()
    asked = [Asked(0, 20, indexes[0], 150), Asked(20, 33, indexes[1], 1031)]
    asked += [Asked(60, 1, indexes[2], 64), Asked(62, 7, indexes[0], 150)]
    with using(isa):
        together = method.choose(1, q, [], asked)
        alone = [found for one in asked for found in method.choose(1, q, [], [one])]
        assert method.choose(1, q, [], []) == []
    for one, a, b in zip(asked, together, alone, strict=True):
        assert a.size == b.size == 4
        assert a.chunks.shape[:2] == (one.rows, 2)
        assert torch.equal(a.chunks, b.chunks)
        plain = one.index.choose(1, q[one.part], 13)
        differ = (a.chunks != plain).any(-1).float().mean()  # means' products are rounded apart
        assert differ < 0.1


def test_too_few_entries_to_be_worth_it() -> None:
    method = Landmarks(budget=64, chunk=8, outliers=4, local=2)
    layer = entries(64 + 32 + 16, 1, 16, torch.float32)
    known = facts((1, 1), 16, torch.float32)
    assert method.index(known, lambda _: layer, np.zeros(112, dtype=np.int32), unasked) is None
    layer = entries(64 + 32 + 16 + 8, 1, 16, torch.float32)
    assert method.index(known, lambda _: layer, np.zeros(120, dtype=np.int32), unasked) is not None


def test_bytes() -> None:
    index, _ = index_of(Landmarks(budget=64, outliers=2), 400, (2, 2), 32, torch.bfloat16)
    chunks = 400 // 8 - 4
    means = 2 * -(-chunks // 16) * 16 * 32 * 2
    assert index.nbytes == 2 * (means + 2 * chunks)
    assert replace(index, means=index.means[:1]).nbytes < index.nbytes


def test_chunks_as_single_entries() -> None:
    """The last chunk of a node is cut short, and one that is not there stays visible."""
    chunks = torch.tensor([[[0, 2]], [[3, 7]]])
    places, mask = Chosen(chunks, 3).places(24)
    assert places.tolist() == [[[0, 1, 2, 6, 7, 8]], [[9, 10, 11, 21, 22, 23]]]
    assert mask is None
    places, mask = Chosen(chunks, 3).places(23)
    assert mask is not None
    assert mask[1, 0].tolist() == [True] * 5 + [False]
    assert int(places.max()) == 22
    seen = torch.tensor([[[True, False]], [[False, True]]])
    places, mask = Chosen(chunks, 3, seen).places(22)
    assert mask is not None
    assert places[mask].tolist() == [0, 1, 2, 21]
    places, mask = Chosen(chunks, 3).places(20)
    assert int(places.max()) == 23
    places, mask = Chosen(chunks).places(20)
    assert torch.equal(places, chunks)
    assert mask is None
