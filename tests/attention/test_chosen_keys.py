"""Attention over chosen keys: the native path and plain products against loops in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from instruction_sets import NAMES, using

from quire.attention import chosen
from quire.kv.method import Entries


def written_out(
    q: Tensor,
    entries: Entries,
    choice: list[list[Tensor]],
    block: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Row by row."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    kv_heads, size = entries.positions.shape
    start = size - len(q)
    for row in range(len(q)):
        own = range(start + row // block * block, start + row + 1)
        for head in range(q.shape[1]):
            kv = head // (q.shape[1] // kv_heads)
            places = [*choice[row // block][kv].tolist(), *own]
            scores = entries.keys[kv, places].double() @ q[row, head].double() * scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            out[row, head] = scores.softmax(0) @ entries.values[kv, places].double()
    return out


def some(
    rows: int, before: int, heads: tuple[int, int], dim: int, block: int, dtype: torch.dtype
) -> tuple[Tensor, Entries, list[list[Tensor]]]:
    """Random queries and entries; heads choose anything from nothing to everything."""
    kv_heads, group = heads
    q = torch.randn(rows, kv_heads * group, dim).to(dtype)
    keys, values = torch.randn(2, kv_heads, before + rows, dim).to(dtype)
    entries = Entries(keys, values, torch.arange(before + rows).expand(kv_heads, -1))
    choice = []
    for start in range(before, before + rows, block):
        shares = [0.0, 1.0, 0.5, 0.1]
        places = [torch.randperm(start) for _ in range(kv_heads)]
        choice.append([p[: round(shares[h % 4] * len(p))] for h, p in enumerate(places)])
    return q, entries, choice


@pytest.mark.parametrize("isa", ["plain", *NAMES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("rows", "before", "heads", "dim", "block", "softcap"),
    [
        (40, 100, (2, 3), 32, 16, None),
        (33, 7, (3, 1), 16, 16, 5.0),
        (16, 0, (1, 4), 48, 16, None),
        (1, 5, (2, 2), 16, 8, None),
        (70, 61, (4, 2), 20, 32, None),  # heads that the kernels do not take
    ],
)
def test_against_loops(
    isa: str,
    dtype: torch.dtype,
    rows: int,
    before: int,
    heads: tuple[int, int],
    dim: int,
    block: int,
    softcap: float | None,
) -> None:
    torch.manual_seed(rows)
    q, entries, choice = some(rows, before, heads, dim, block, dtype)
    wanted = written_out(q, entries, choice, block, 0.3, softcap)
    near = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 3e-2}
    with using(isa):
        for plain in (False, True):
            found = chosen.attend(
                q, entries, choice, block, scale=0.3, softcap=softcap, plain=plain
            )
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), wanted, **near)


def test_copies_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, entries, choice = some(50, 90, (2, 2), 16, 16, torch.float32)
    wanted = chosen.attend(q, entries, choice, 16, scale=0.3)
    gathered = []
    index_select = Tensor.index_select

    def counting(x: Tensor, dim: int, index: Tensor) -> Tensor:
        gathered.append(len(index))
        return index_select(x, dim, index)

    monkeypatch.setattr(Tensor, "index_select", counting)
    monkeypatch.setattr(chosen, "GATHERED", 200)
    found = chosen.attend(q, entries, choice, 16, scale=0.3)
    torch.testing.assert_close(found, wanted)
    assert len(gathered) == 0 or max(gathered) < 200 + 2 * 2 * 16 + 2 * 2 * 15


def test_stored_entries_of_another_type() -> None:
    """A store may read back float32 for a bfloat16 model."""
    torch.manual_seed(1)
    q, entries, choice = some(20, 30, (2, 2), 16, 16, torch.bfloat16)
    wide = Entries(entries.keys.float(), entries.values.float(), entries.positions)
    found = chosen.attend(q, wide, choice, 16, scale=0.3)
    assert torch.equal(found, chosen.attend(q, entries, choice, 16, scale=0.3))
