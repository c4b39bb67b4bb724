"""Chunks of synthetic prompts, and what a choice makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kv.method import Calibration, Entries, Facts


def facts(
    kv_heads: int, group: int, dim: int, dtype: torch.dtype, softcap: float | None = None
) -> Facts:
    return Facts(
        layers=2,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=dim,
        dtype=dtype,
        scale=dim**-0.5,
        windows=(None, None),
        turn=lambda *given: given[1],
        calibrate=lambda: Calibration([], [], []),
        softcap=softcap,
    )


def chunk(known: Facts, before: int, rows: int) -> tuple[Tensor, Entries]:
    """Random queries of a chunk, and the entries of the prompt up to its end."""
    q = torch.randn(rows, known.heads, known.head_dim).to(known.dtype)
    keys, values = torch.randn(2, known.kv_heads, before + rows, known.head_dim).to(known.dtype)
    return q, Entries(keys, values, torch.arange(before + rows).expand(known.kv_heads, -1))


def hot_chunk(known: Facts, before: int, rows: int, every: int) -> tuple[Tensor, Entries]:
    """One key in ``every``, anywhere, is what all queries look for."""
    q, entries = chunk(known, before, rows)
    wanted = torch.randn(known.kv_heads, known.head_dim)
    wanted = 6 * wanted / wanted.norm(dim=-1, keepdim=True)
    hot = torch.rand(entries.positions.shape) < 1 / every
    keys = 0.3 * entries.keys + hot[..., None] * wanted[:, None]
    q = 0.3 * q + wanted.repeat_interleave(known.group, 0)
    return q, Entries(keys, entries.values, entries.positions)


def weights(known: Facts, q: Tensor, entries: Entries) -> Tensor:
    """Dense causal attention, float64 ``[rows, kv_heads, group, n]``."""
    rows = q.double().unflatten(1, (known.kv_heads, -1))
    scores = torch.einsum("rhgd,hnd->rhgn", rows, entries.keys.double()) * known.scale
    if known.softcap is not None:
        scores = known.softcap * (scores / known.softcap).tanh()
    at = torch.arange(len(entries) - len(q), len(entries))
    return scores.masked_fill(
        (entries.positions > at[:, None, None])[:, :, None], -torch.inf
    ).softmax(-1)


def density(choice: list[list[Tensor]], block: int, start: int, rows: int) -> float:
    """Keys read, of those that dense attention reads: own blocks included, as triangles."""
    sizes = [min(block, rows - b * block) for b in range(len(choice))]
    own = sum(n * (n + 1) / 2 for n in sizes)
    read = sum(
        n * sum(map(len, heads)) / len(heads) for n, heads in zip(sizes, choice, strict=True)
    )
    return (read + own) / (rows * start + rows * (rows + 1) / 2)


def recovered(
    known: Facts, q: Tensor, entries: Entries, choice: list[list[Tensor]], block: int
) -> float:
    """The share of dense attention that goes to keys that are read."""
    dense = weights(known, q, entries)
    start = len(entries) - len(q)
    total = 0.0
    for b, heads in enumerate(choice):
        mine = dense[b * block : (b + 1) * block]
        for head, places in enumerate(heads):
            total += mine[:, head, :, places].sum().item()
            total += mine[:, head, :, start + b * block :].sum().item()
    return total / (len(q) * known.heads)
