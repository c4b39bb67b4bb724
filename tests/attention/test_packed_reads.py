"""The native attention over packed entries against the plain one over what they read as."""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from instruction_sets import threads

from quire.attention import composed, packed
from quire.attention.composed import Partial, Reads
from quire.attention.native import Shape
from quire.attention.packed import SpanRead
from quire.kv.arena import Arena
from quire.kv.method import Entries
from quire.kv.pages import Span
from quire.kv.store.packed import Format, Packed

# Values of size 1, scores of a few: softmax weights are rounded to 255 levels of a block's largest
# and queries to 127, or (8 bits) both to 2^15. An error is the sum of very many.
TOLERANCE = {8: 3e-4, 4: 0.06, 2: 0.12}
LAYERS = 2


ISAS = pytest.mark.usefixtures("isa")


def entries(heads: int, n: int, dim: int, first: int = 0) -> Entries:
    keys, values = torch.randn(2, heads, n, dim)
    keys = keys + 2 * torch.randn(heads, 1, dim)  # channels have their own middles
    return Entries(keys, values, torch.arange(first, first + n).expand(heads, n))


def make(heads: int, n: int, dim: int, keys: Format, values: Format, first: int = 0) -> Packed:
    return Packed.make([entries(heads, n, dim, first) for _ in range(LAYERS)], keys, values)


@dataclass
class Step:
    """Rows with their reads; what the kernels and what PyTorch make of them."""

    shape: Shape
    q: Tensor
    reads: list[SpanRead]
    positions: Tensor

    @classmethod
    def of(
        cls, shape: Shape, rows: int, reads: list[SpanRead], dtype: torch.dtype = torch.float32
    ) -> Step:
        # As a view into the rows of a wider matrix.
        wide = torch.randn(rows, shape.heads * shape.head_dim + 24).to(dtype)
        q = wide[:, 8:-16].view(rows, shape.heads, shape.head_dim)
        return cls(shape, q, reads, torch.full((rows,), 10**6))

    def add(
        self, *, native: bool, layer: int, softcap: float | None, window: int | None
    ) -> Partial:
        reads = Reads(self.reads, [])
        if native:
            reads = reads.planned(self.shape, {window}, self.positions.numpy())
            assert sum(packed.fits(read.span, window) for read in self.reads)
        generator = torch.Generator().manual_seed(1)
        shape = (len(self.q), self.shape.heads)
        total = Partial(
            torch.randn(*shape, self.shape.head_dim, generator=generator),
            torch.randn(shape, generator=generator) + 3,
        )
        total.lse[::2] = -torch.inf  # rows that have read nothing yet
        total.out[::2] = 0
        arena = Arena.make(1, 1, 1, 1, torch.float32)  # nothing is read from it
        scale = self.shape.head_dim**-0.5
        composed.add_reads(
            total,
            reads,
            arena,
            layer,
            self.q,
            self.positions,
            [],
            scale=scale,
            softcap=softcap,
            window=window,
        )
        return total

    def compare(
        self, bits: int, *, softcap: float | None = None, window: int | None = None
    ) -> None:
        for layer in range(LAYERS):
            found = self.add(native=True, layer=layer, softcap=softcap, window=window)
            wanted = self.add(native=False, layer=layer, softcap=softcap, window=window)
            assert torch.equal(found.lse == -torch.inf, wanted.lse == -torch.inf)
            for a, b in ((found.out, wanted.out), (found.lse, wanted.lse)):
                torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[bits])


def formats(bits: int, group: int = 32, scales: torch.dtype = torch.bfloat16) -> list[Format]:
    return [Format(bits, group, along, scales) for along in (True, False)]


@ISAS
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_all_ways_to_group(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    for keys, values in itertools.product(formats(bits), formats(bits)):
        data = make(2, 333, 64, keys, values)
        reads = [SpanRead(0, 3, Span(data, 5, 310, frozenset()), None)]
        Step.of(Shape(LAYERS, 8, 2, 64), 3, reads, dtype).compare(bits)


SIZES = [(16, 1, 1, 16), (32, 2, 3, 32), (48, 3, 1, 16), (64, 1, 8, 64), (80, 2, 4, 16)]
SIZES += [(96, 1, 7, 96), (112, 1, 5, 16), (128, 2, 2, 128), (192, 1, 3, 64), (256, 1, 4, 32)]


@ISAS
@pytest.mark.parametrize(("dim", "kv_heads", "group", "wide"), SIZES)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_sizes_of_heads(dim: int, kv_heads: int, group: int, wide: int, bits: int) -> None:
    torch.manual_seed(dim + bits)
    for along in (True, False):
        keys = Format(bits, wide, along, torch.float32)
        values = Format(bits, wide, not along, torch.float32)
        data = make(kv_heads, 200, dim, keys, values)
        reads = [SpanRead(0, 2, Span(data, 0, 200, frozenset()), None)]
        Step.of(Shape(LAYERS, kv_heads * group, kv_heads, dim), 2, reads).compare(bits)


@ISAS
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 33])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 129, 1500])
def test_numbers_of_rows_and_keys(rows: int, n: int) -> None:
    torch.manual_seed(rows + n)
    data = make(1, n, 32, *formats(4))
    reads = [SpanRead(0, rows, Span(data, 0, n, frozenset()), None)]
    Step.of(Shape(LAYERS, 3, 1, 32), rows, reads).compare(4)


@ISAS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 2])
def test_many_reads_at_once(seed: int, count: int) -> None:
    """Nodes with several readers and readers of several nodes, on one thread and two."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows = 12
    reads = []
    for _ in range(7):
        n = rng.choice([16, 40, 300, 2500])
        data = make(2, n, 32, *rng.choice([formats(2), formats(4)]))
        start = rng.randrange(n)
        row = rng.randrange(rows)
        stop = rng.randrange(start + 1, n + 1)
        span = Span(data, start, stop, frozenset())
        kept = None
        if rng.random() < 0.5:
            kept = np.array([[rng.randrange(-3, n) for _ in range(2)] for _ in range(LAYERS)])
        reads.append(SpanRead(row, rng.randrange(1, rows - row + 1), span, kept))
    step = Step.of(Shape(LAYERS, 4, 2, 32), rows, reads)
    with threads(count):
        step.compare(4)


@ISAS
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 40, 500])
def test_windows_and_soft_caps(softcap: float | None, window: int | None) -> None:
    torch.manual_seed(0)
    data = make(2, 400, 32, *formats(8), first=100)
    reads = [SpanRead(1, 4, Span(data, 30, 380, frozenset()), None)]
    step = Step.of(Shape(LAYERS, 4, 2, 32), 6, reads)
    step.positions = torch.tensor([600, 505, 530, 620, 2000, 600])
    step.compare(8, softcap=softcap, window=window)


@ISAS
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_numbers_without_middles(scales: torch.dtype, bits: int) -> None:
    torch.manual_seed(0)
    for along in (True, False):
        form = Format(bits, 32, along, scales, centred=True)
        data = make(2, 100, 64, form, form)
        reads = [SpanRead(0, 2, Span(data, 0, 100, frozenset()), None)]
        Step.of(Shape(LAYERS, 4, 2, 64), 2, reads).compare(bits)


@ISAS
def test_more_bits_for_keys_than_for_values() -> None:
    torch.manual_seed(0)
    for keys, values in ((formats(8)[0], formats(2)[1]), (formats(2)[0], formats(8)[1])):
        data = make(2, 100, 64, keys, values)
        reads = [SpanRead(0, 2, Span(data, 0, 100, frozenset()), None)]
        Step.of(Shape(LAYERS, 4, 2, 64), 2, reads).compare(2)


@ISAS
@pytest.mark.parametrize("bits", [8, 4])
def test_large_scores_and_equal_keys(bits: int) -> None:
    """One key far above all others; scores far below; and many that are the same."""
    torch.manual_seed(0)
    keys = torch.zeros(1, 600, 32)
    keys[:, 500, 0] = 400
    data = Packed.make(
        [Entries(keys, torch.randn(1, 600, 32), torch.arange(600)[None])] * LAYERS, *formats(bits)
    )
    reads = [SpanRead(0, 3, Span(data, 0, 600, frozenset()), None)]
    step = Step.of(Shape(LAYERS, 2, 1, 32), 3, reads)
    step.q[0], step.q[1], step.q[2] = 0, 100, -100
    step.compare(bits)


@ISAS
def test_numbers_that_are_all_zero() -> None:
    zeros = Entries(torch.zeros(1, 40, 32), torch.zeros(1, 40, 32), torch.arange(40)[None])
    data = Packed.make([zeros] * LAYERS, *formats(4))
    reads = [SpanRead(0, 1, Span(data, 0, 40, frozenset()), None)]
    Step.of(Shape(LAYERS, 2, 1, 32), 1, reads).compare(4)


@ISAS
def test_what_is_turned_before_rounding() -> None:
    """Queries are turned like keys, and the result back like values."""
    torch.manual_seed(0)
    turn = [torch.linalg.qr(torch.randn(2, 32, 32))[0] for _ in range(LAYERS)]
    back = tuple(t.transpose(1, 2) for t in turn)
    layers = [entries(2, 100, 32) for _ in range(LAYERS)]
    turned = [
        replace(e, keys=e.keys @ t, values=e.values @ t) for e, t in zip(layers, turn, strict=True)
    ]
    for key_back, value_back in ((back, back), (back, None), (None, back)):
        data = Packed.make(turned, *formats(8), key_back=key_back, value_back=value_back)
        reads = [SpanRead(0, 2, Span(data, 0, 100, frozenset()), None)]
        reads.append(SpanRead(1, 2, Span(make(2, 50, 32, *formats(8)), 0, 50, frozenset()), None))
        Step.of(Shape(LAYERS, 4, 2, 32), 3, reads).compare(8)


@ISAS
@pytest.mark.parametrize(
    ("bits", "share"), [(8, 0.05), (4, 0.4), (2, 0.2)], ids=["8 bits", "4 bits", "2 bits"]
)
def test_the_error_is_small_beside_that_of_the_codes(bits: int, share: float) -> None:
    torch.manual_seed(bits)
    exact = entries(2, 1000, 64)
    data = Packed.make([exact] * LAYERS, *formats(bits))
    reads = [SpanRead(0, 4, Span(data, 0, 1000, frozenset()), None)]
    step = Step.of(Shape(LAYERS, 16, 2, 64), 4, reads)
    found = step.add(native=True, layer=0, softcap=None, window=None)
    rounded = step.add(native=False, layer=0, softcap=None, window=None)
    plain = Packed.make([exact] * LAYERS, *formats(8, 16, torch.float32))
    step.reads = [SpanRead(0, 4, Span(plain, 0, 1000, frozenset()), None)]
    if bits < 8:
        wanted = step.add(native=False, layer=0, softcap=None, window=None).out
    else:
        wanted = composed.partial(step.q, exact, scale=0.125, softcap=None).out
        rounded.out[1::2] = found.out[1::2] = wanted[1::2]  # these had read something before
    mine = (found.out - rounded.out).square().mean().sqrt()
    theirs = (rounded.out - wanted).square().mean().sqrt()
    assert mine < share * theirs


def test_what_fits() -> None:
    torch.manual_seed(0)
    data = make(1, 40, 32, *formats(4))
    span = Span(data, 0, 40, frozenset())
    assert packed.fits(span, None)
    assert packed.fits(span, 10)
    apart = entries(1, 40, 32)
    apart = replace(apart, positions=apart.positions * 2)
    data = Packed.make([apart], *formats(4))
    assert packed.fits(Span(data, 0, 40, frozenset()), None)
    assert not packed.fits(Span(data, 0, 40, frozenset()), 10)  # positions are not neighbours
    assert not packed.fits(Span(make(1, 40, 24, *formats(4, 8)), 0, 40, frozenset()), None)
    assert not packed.fits(Span(object(), 0, 40, frozenset()), None)


def test_no_reads() -> None:
    step = Step.of(Shape(LAYERS, 2, 1, 32), 2, [])
    reads = Reads([], []).planned(step.shape, {None}, step.positions.numpy())
    assert not reads
    assert reads.plans == {None: []}
