"""What tests of stores share: the facts of a model, entries, and reads with the native kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import toy
from quire.attention import composed, packed
from quire.attention.composed import Partial, Reads
from quire.attention.native import Shape
from quire.attention.packed import SpanRead
from quire.kv.arena import Arena
from quire.kv.method import Calibration, Entries, Facts, Stored
from quire.kv.pages import Segment, Span

LAYERS = 2
CALIBRATED = 200  # tokens


def make_facts(
    kv_heads: int = 2,
    head_dim: int = 64,
    *,
    group: int = 1,
    dtype: torch.dtype = torch.float32,
    loud: Tensor | None = None,
    bias: Tensor | None = None,
) -> Facts:
    """The calibration's keys are ``loud`` times random ones plus ``bias``.

    Both are ``[kv_heads, head_dim]``.
    """

    def calibrate() -> Calibration:
        generator = torch.Generator().manual_seed(5)
        shape = (LAYERS, CALIBRATED, kv_heads, head_dim)
        keys = torch.randn(shape, generator=generator) * (1 if loud is None else loud)
        keys = keys + (0 if bias is None else bias)
        return Calibration([], list(keys), [])

    heads = kv_heads * group
    return toy.make_facts(heads, kv_heads, LAYERS, head_dim, dtype, calibrate=calibrate)


def make_entries(
    facts: Facts,
    n: int,
    *,
    first: int = 0,
    seed: int = 0,
    loud: Tensor | None = None,
    bias: Tensor | None = None,
) -> list[Entries]:
    """Of each layer, neighbours from position ``first`` on, their keys as in the calibration."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, facts.layers, facts.kv_heads, n, facts.head_dim)
    keys, values = torch.randn(shape, generator=generator)
    if loud is not None:
        keys = keys * loud[:, None]
    if bias is not None:
        keys = keys + bias[:, None]
    positions = torch.arange(first, first + n).expand(facts.kv_heads, -1)
    layers = range(facts.layers)
    return [
        Entries(
            facts.rotate(layer, keys[layer], positions).to(facts.dtype),
            values[layer].to(facts.dtype),
            positions,
        )
        for layer in layers
    ]


def scattered(layers: list[Entries]) -> list[Entries]:
    """The same with positions that differ from head to head, as a selection leaves them."""
    steps = torch.arange(1, len(layers[0].keys) + 1)[:, None]
    return [Entries(e.keys, e.values, e.positions * steps + 3) for e in layers]


def error(stored: Stored, layers: list[Entries], part: str = "keys") -> float:
    """Mean squared error of what a store reads as, as a share of the mean square."""
    missed = total = 0.0
    for layer, entries in enumerate(layers):
        wanted = getattr(entries, part).float()
        missed += float((getattr(stored.read(layer), part) - wanted).square().sum())
        total += float(wanted.square().sum())
    return missed / total


def attend(stored: Stored, n: int, facts: Facts, layer: int, *, native: bool) -> Partial:
    """What five rows read of ``stored``, of which the native kernels take what they can."""
    rows = 5
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(rows, facts.heads, facts.head_dim, generator=generator)
    segment = Segment(length=n, stored=[Span(stored, 0, n, frozenset())])
    spans = [SpanRead(0, rows, span, kept) for span, kept in composed.spans_of(segment)]
    reads = Reads(spans, [])
    at = torch.full((rows,), 10**6)
    if native:
        shape = Shape(facts.layers, facts.heads, facts.kv_heads, facts.head_dim)
        reads = reads.planned(shape, {None}, at.numpy().astype(np.int64))
        assert packed.fits(spans[-1].span, None)
    total = Partial(torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf))
    composed.add_reads(
        total,
        reads,
        Arena.make(1, 1, 1, 1, torch.float32),  # nothing is read from it
        layer,
        q,
        at,
        [],
        scale=facts.scale,
        softcap=None,
        window=None,
    )
    return total


def check_native(stored: Stored, n: int, facts: Facts, tolerance: float) -> None:
    """The native kernels' attention is that over what the store reads as."""
    for layer in range(facts.layers):
        mine = attend(stored, n, facts, layer, native=True)
        wanted = attend(stored, n, facts, layer, native=False)
        torch.testing.assert_close(mine.out, wanted.out, rtol=0, atol=tolerance)
        torch.testing.assert_close(mine.lse, wanted.lse, rtol=0, atol=tolerance)


def check_chosen(stored: Stored, facts: Facts, n: int) -> None:
    """Entries that are read by their places are those that are read with all."""
    index = torch.randint(n, (3, facts.kv_heads, 5), generator=torch.Generator().manual_seed(n))
    heads = torch.arange(facts.kv_heads)[:, None]
    for layer in range(facts.layers):
        every, some = stored.read(layer), stored.read(layer, index)
        assert torch.equal(some.positions, every.positions[heads, index])
        for a, b in ((some.keys, every.keys), (some.values, every.values)):
            torch.testing.assert_close(a, b[heads, index], rtol=1e-5, atol=1e-5)
