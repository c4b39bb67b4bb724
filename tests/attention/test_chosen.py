"""Native attention over chosen entries of the arena, against gathering them with PyTorch."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from instruction_sets import threads

from quire.attention import composed
from quire.attention.composed import Choice, Partial, Reads
from quire.attention.native import Shape
from quire.kernels.kv import PAGE
from quire.kv.arena import TiledArena
from quire.kv.method import Asked, Chosen, Reader
from quire.kv.pages import PagePool, Segment

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


ISAS = pytest.mark.usefixtures("isa")


class Given:
    """A fetch whose indexes are what is chosen."""

    window = 0

    def index(self, *_: object) -> None:
        raise AssertionError("nothing is indexed here")

    def choose(
        self, _layer: int, _q: Tensor, _readers: Sequence[Reader], asked: Sequence[Asked]
    ) -> list[Chosen]:
        return [a.index for a in asked]


class Case:
    def __init__(
        self, seed: int, dtype: torch.dtype, *, dim: int = 32, heads: tuple[int, int] = (2, 2)
    ) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.pool = PagePool(300, PAGE)
        self.kv_heads, group = heads
        self.arena = TiledArena.make(2, self.kv_heads, dim, 300 * PAGE, dtype)
        for tensor in (self.arena.keys, self.arena.values):
            tensor.fill_(1e4).view(-1)[::3] *= -1  # slots that are never written
        self.shape = Shape(2, self.kv_heads * group, self.kv_heads, dim)
        self.choices: list[Choice] = []
        self.dtype = dtype

    def segment(self, length: int) -> Segment:
        segment = Segment()
        while segment.length < length:
            count = min(self.rng.randrange(1, 90), length - segment.length)
            slots = torch.from_numpy(self.pool.append(segment, count))
            for layer in range(2):
                k, v = torch.randn(2, count, self.kv_heads, self.shape.head_dim).to(self.dtype)
                self.arena.write(layer, slots, k, v)
            if self.rng.random() < 0.4:
                self.pool.append(Segment(), 1)  # the next page is elsewhere
        return segment

    def choose(
        self, row: int, rows: int, length: int, count: int, run: int, *, masked: bool = False
    ) -> None:
        segment = self.segment(length)
        if self.rng.random() < 0.5 and length > 20:
            self.pool.cut(segment, self.rng.randrange(1, 9))  # begins within a page
        starts = -(-segment.entries // run)
        chunks = torch.stack(
            [torch.randperm(starts)[: -(-count // run)] for _ in range(rows * self.kv_heads)]
        )
        chunks = chunks.view(rows, self.kv_heads, -1)
        mask = torch.rand(chunks.shape) < 0.7 if masked else None
        given = Chosen(chunks, run, mask)
        start = self.rng.randrange(40)
        self.choices.append(Choice(row, rows, given, segment.entries, segment, start))

    def compare(
        self, rows: int, softcap: float | None = None, window: int | None = None, at: int = 5000
    ) -> None:
        q = torch.randn(rows, self.shape.heads, self.shape.head_dim + 8).to(self.dtype)
        q = q.flatten(1)[:, : self.shape.heads * self.shape.head_dim].unflatten(
            1, (self.shape.heads, -1)
        )
        positions = at + torch.arange(rows)
        found = []
        for native in (True, False):
            reads = Reads([], self.choices, Given())
            if native:
                reads = reads.planned(self.shape, {window}, positions.numpy())
            generator = torch.Generator().manual_seed(1)
            total = Partial(
                torch.randn(q.shape, generator=generator),
                torch.randn(q.shape[:2], generator=generator) + 2,
            )
            composed.add_reads(
                total,
                reads,
                self.arena,
                1,
                q,
                positions,
                [],
                scale=0.2,
                softcap=softcap,
                window=window,
            )
            found.append(total)
        for a, b in ((found[0].out, found[1].out), (found[0].lse, found[1].lse)):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[self.dtype])


@ISAS
@DTYPES
@pytest.mark.parametrize("run", [1, 2, 3, 8, 16, 24, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_runs_of_neighbours(dtype: torch.dtype, run: int, masked: bool) -> None:
    case = Case(run, dtype)
    case.choose(1, 3, 700, 192, run, masked=masked)
    case.compare(5, None if masked else 2.0)


@ISAS
@DTYPES
@pytest.mark.parametrize(
    ("dim", "kv_heads", "group"), [(16, 1, 1), (48, 2, 3), (80, 1, 4), (128, 1, 7), (256, 1, 8)]
)
def test_sizes_of_heads(dtype: torch.dtype, dim: int, kv_heads: int, group: int) -> None:
    case = Case(dim, dtype, dim=dim, heads=(kv_heads, group))
    case.choose(0, 2, 300, 104, 8)
    case.compare(2)


@ISAS
@pytest.mark.parametrize("count", [1, 2])
def test_rows_with_several_choices(count: int) -> None:
    """Of one segment for some rows, of two for others, of none for the last."""
    case = Case(3, torch.float32)
    case.choose(0, 4, 400, 64, 8)
    case.choose(2, 3, 90, 30, 1, masked=True)
    case.choose(3, 1, 17, 17, 1)
    with threads(count):
        case.compare(6)


@ISAS
@pytest.mark.parametrize("entries", [1, 7, 8, 9])
def test_few_entries(entries: int) -> None:
    case = Case(entries, torch.float32)
    case.choose(0, 1, entries, entries, 1)
    case.compare(1)


@ISAS
def test_nothing_chosen() -> None:
    case = Case(0, torch.float32)
    case.choose(0, 2, 50, 16, 8)
    case.choose(0, 2, 50, 16, 8, masked=True)
    case.choices[1].index.mask.fill_(False)
    case.compare(2)
    del case.choices[0]
    case.compare(2)


@ISAS
@DTYPES
@pytest.mark.parametrize("run", [1, 5, 8, 16])
@pytest.mark.parametrize("window", [1, 30, 333, 2000])
def test_windows(dtype: torch.dtype, run: int, window: int) -> None:
    """Which begin within chunks, see everything, or nothing."""
    case = Case(window + run, dtype)
    case.choose(0, 3, 500, 200, run)
    case.choose(2, 2, 90, 40, run, masked=True)
    case.compare(5, window=window, at=510)


@ISAS
@DTYPES
def test_everything_in_whole_pages(dtype: torch.dtype) -> None:
    """And with every other half left out, so that no page is whole."""
    case = Case(5, dtype)
    segment = case.segment(333)
    for step, size in ((1, PAGE), (2, PAGE // 2)):
        chunks = torch.arange(0, -(-333 // size), step).expand(2, case.kv_heads, -1).contiguous()
        case.choices = [Choice(1, 2, Chosen(chunks, size), 333, segment, 0)]
        case.compare(4)


@ISAS
@pytest.mark.parametrize("wrong", [-9, 8, 900])
def test_chunks_that_are_not_there(wrong: int) -> None:
    case = Case(0, torch.float32)
    case.choose(0, 1, 64, 16, 8)
    case.choices[0].index.chunks[0, 1, 1] = wrong
    with pytest.raises(IndexError, match="not in its segment"):
        case.compare(1)
