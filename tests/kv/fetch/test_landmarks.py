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
from quire.kv.method import Entries, Facts
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
        places, mask = index.choose(1, q, [])
    assert mask is None
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
            found = places[row, head].tolist()
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
            places, _ = index.choose(0, q, [])
        found = places[0, 0].tolist()
        assert len(set(found)) == len(found)
        assert all(0 <= place < 200 for place in found)


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
    always = 2 * (2 * 8 + 400 - chunks * 8) * 8
    assert index.nbytes == 2 * (means + 2 * chunks + always)
    assert replace(index, means=index.means[:1]).nbytes < index.nbytes
