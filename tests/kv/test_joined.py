"""Stored parts that are one: read, and laid out for attention, as if they were one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from quire.attention.composed import span_entries, spans_of
from quire.kv.method import Entries, Joined, Plain, gather
from quire.kv.pages import Segment, Span

SIZES = (3, 1, 6)


def make(n: int) -> Plain:
    generator = torch.Generator().manual_seed(n)
    keys, values = torch.randn(2, 2, n, 4, generator=generator)
    return Plain((Entries(keys, values, torch.arange(n).expand(2, -1)),))


@pytest.fixture
def whole() -> Plain:
    return make(sum(SIZES))


@pytest.fixture
def parts(whole: Plain) -> Joined:
    ends = np.cumsum((0, *SIZES)).tolist()
    (e,) = whole.layers
    cut = [Plain((e.part(a, b),)) for a, b in pairwise(ends)]
    return Joined(tuple(cut), SIZES)


def test_read(whole: Plain, parts: Joined) -> None:
    assert parts.nbytes == whole.nbytes
    index = torch.tensor([[[9, 0, 3, 2], [4, 4, 1, 8]], [[0, 1, 2, 3], [3, 2, 1, 0]]])
    for found, wanted in (
        (parts.read(0), whole.read(0)),
        (parts.read(0, index), gather(whole.layers[0], index)),
    ):
        assert torch.equal(found.keys, wanted.keys)
        assert torch.equal(found.values, wanted.values)
        assert torch.equal(found.positions, wanted.positions)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (2, 4), (3, 4), (5, 5), (1, 9), (4, 10)])
def test_spans(whole: Plain, parts: Joined, start: int, stop: int) -> None:
    """Of a node that was cut, and of a second span after it, with fewer kept in one head."""
    more = make(2)
    spans = [Span(parts, start, stop, frozenset()), Span(more, 0, 2, frozenset())]
    kept = np.array([[1, stop - start + 1]])
    segment = Segment(length=stop - start + 2, stored=spans, kept=kept)
    found = [span_entries(span, valid, 0) for span, valid in spans_of(segment)]
    for head, count in enumerate(kept[0]):
        mine = torch.cat([part.head(head).keys for part in found], dim=1)
        wanted = torch.cat([whole.read(0).keys[:, start:stop], more.read(0).keys], dim=1)
        assert torch.equal(mine, wanted[head : head + 1, :count])
