"""The native attention against the plain reference, and its independence of the batch."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from instruction_sets import threads, using, with_each

from quire.attention import native, reference
from quire.attention.segments import Item
from quire.kernels.kv import PAGE
from quire.kv.arena import TiledArena
from quire.kv.pages import PagePool, Segment

Above = tuple[tuple[Segment, int], ...]

LAYERS = 2
# The reference works in float32 throughout. In bfloat16 the kernels round the weights of the
# values, each half a unit (2^-8) of itself, and so does the result: with values of size 1, weighted
# with a sum of 1, that is at most 2^-8 of the largest value twice, about 0.03; most is far below.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


ISAS = pytest.mark.usefixtures("isa")


def make_arena(kv_heads: int, dim: int, pages: int, dtype: torch.dtype) -> TiledArena:
    """An arena in which slots that are never written hold large numbers."""
    arena = TiledArena.make(LAYERS, kv_heads, dim, pages * PAGE, dtype)
    for tensor in (arena.keys, arena.values):
        tensor.fill_(1e4).view(-1)[::3] *= -1
    return arena


class Case:
    """A random tree: shared segments with items of one or more rows below them."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype = torch.float32,
        *,
        dim: int = 32,
        heads: tuple[int, int] = (2, 2),
        trim: bool = False,
        longest: int = 60,
    ) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.pool = PagePool(800, PAGE)
        self.kv_heads, group = heads
        self.arena = make_arena(self.kv_heads, dim, self.pool.pages, dtype)
        self.dtype, self.dim, self.trim, self.longest = dtype, dim, trim, longest
        self.shape = native.Shape(LAYERS, self.kv_heads * group, self.kv_heads, dim)
        self.items: list[Item] = []
        self.grow(0, 0, (), ())
        rows = sum(item.count for item in self.items)
        # As views into the rows of a wider matrix.
        wide = torch.randn(rows, self.shape.heads * dim + 24).to(dtype)
        self.q = wide[:, 8:-16].view(rows, -1, dim)

    def segment(self, length: int) -> Segment:
        segment = Segment()
        while segment.length < length:
            count = min(self.rng.randrange(1, 40), length - segment.length)
            slots = torch.from_numpy(self.pool.append(segment, count))
            for layer in range(LAYERS):
                k, v = torch.randn(2, count, self.kv_heads, self.dim).to(self.dtype)
                self.arena.write(layer, slots, k, v)
            if self.rng.random() < 0.4:
                self.pool.append(Segment(), 1)  # the next page is elsewhere
        return segment

    def shared(self, at: int, length: int) -> Above:
        """A segment, or its two halves, one of which begins within a page."""
        segment = self.segment(length)
        above: Above = ((segment, at),)
        if length > 1 and self.rng.random() < 0.4:
            cut = self.rng.randrange(1, length)
            above = ((self.pool.cut(segment, cut), at), (segment, at + cut))
        if self.trim:
            for part, _ in above:
                if self.rng.random() < 0.6:
                    kept = np.array(
                        [
                            [self.rng.randrange(1, part.length + 1) for _ in range(self.kv_heads)]
                            for _ in range(LAYERS)
                        ]
                    )
                    kept[0][0] = part.length
                    part.kept = kept
        return above

    def grow(self, depth: int, at: int, above: Above, key: tuple[int, ...]) -> None:
        for child in range(self.rng.randrange(1, 4)):
            mine = (*key, child)
            if depth < 3 and self.rng.random() < 0.5:
                length = self.rng.randrange(1, self.longest)
                more = self.shared(at, length)
                self.grow(depth + 1, at + length, above + more, mine)
            else:
                count = self.rng.choice([1, 1, 2, 7, 30, 100])
                prior = self.rng.choice([0, 0, 5, 40, 3 * self.longest])
                item = Item(mine, at + prior, count, self.segment(prior + count), above)
                self.items.append(item)

    def attend(
        self, window: int | None, softcap: float | None, *, in_order: bool = False, layer: int = 1
    ) -> Tensor:
        plan = native.Plan.make(self.items, self.shape, window, in_order=in_order)
        return native.attend(self.arena, layer, self.q, plan, scale=0.2, softcap=softcap)

    def compare(
        self, window: int | None = None, softcap: float | None = None, *, count: int = 1
    ) -> None:
        """With every instruction set, and sums in either order, on ``count`` threads."""
        for layer in range(LAYERS):
            expected = reference.attend(
                self.arena, layer, self.q, self.items, scale=0.2, softcap=softcap, window=window
            )
            for in_order in (False, True):
                with threads(count):
                    found = with_each(
                        lambda layer=layer, in_order=in_order: self.attend(
                            window, softcap, in_order=in_order, layer=layer
                        )
                    )
                for name, result in found.items():
                    assert result.dtype == self.dtype
                    assert result.is_contiguous()
                    error = (result.float() - expected.float()).abs().max()
                    assert error <= TOLERANCE[self.dtype], (name, layer, in_order)


@DTYPES
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [None, 5, 50])
def test_against_reference(dtype: torch.dtype, seed: int, window: int | None) -> None:
    Case(seed, dtype).compare(window, [None, 2.0][seed % 2])


SIZES = [(16, 1, 1), (48, 2, 3), (64, 3, 3), (80, 1, 4), (96, 1, 9), (112, 2, 1), (128, 1, 7)]
SIZES += [(208, 1, 5), (256, 1, 2)]


@DTYPES
@pytest.mark.parametrize(("dim", "kv_heads", "group"), SIZES)
def test_sizes_of_heads(dtype: torch.dtype, dim: int, kv_heads: int, group: int) -> None:
    case = Case(dim + group, dtype, dim=dim, heads=(kv_heads, group), trim=True)
    case.compare([None, 20][group % 2])


@DTYPES
@pytest.mark.parametrize("seed", range(6))
def test_lengths_of_each_layer_and_head(dtype: torch.dtype, seed: int) -> None:
    Case(seed, dtype, heads=(3, 2), trim=True).compare([None, 30][seed % 2])


@ISAS
@DTYPES
@pytest.mark.parametrize("in_order", [False, True], ids=["free", "in order"])
def test_a_single_key(dtype: torch.dtype, in_order: bool) -> None:
    """The result is its value, but for the rounding of a weight close to 1."""
    torch.manual_seed(0)
    pool = PagePool(4, PAGE)
    arena = make_arena(2, 16, 4, dtype)
    segment = Segment()
    slot = torch.from_numpy(pool.append(segment, 1))
    v = torch.randn(1, 2, 16).to(dtype)
    arena.write(0, slot, torch.randn(1, 2, 16).to(dtype), v)
    items = [Item((0,), 0, 1, segment, ())]
    plan = native.Plan.make(items, native.Shape(LAYERS, 4, 2, 16), None, in_order=in_order)
    found = native.attend(arena, 0, torch.randn(1, 4, 16).to(dtype), plan, scale=1.0)
    expected = v.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected, rtol=2 ** (-21 if v.itemsize == 4 else -8), atol=0)


@ISAS
@DTYPES
def test_equal_keys_and_large_scores(dtype: torch.dtype) -> None:
    """Scores far beyond what exp could hold; and many that are the same."""
    torch.manual_seed(0)
    pool = PagePool(40, PAGE)
    arena = make_arena(1, 16, 40, dtype)
    segment = Segment()
    slots = torch.from_numpy(pool.append(segment, 600))
    k, v = torch.zeros(600, 1, 16), torch.randn(600, 1, 16)
    k[7], k[500] = 100, 100
    arena.write(0, slots, k.to(dtype), v.to(dtype))
    items = [Item((0,), 599, 1, segment, ())]
    plan = native.Plan.make(items, native.Shape(LAYERS, 3, 1, 16), None)
    q = torch.cat([torch.full((1, 1, 16), s) for s in (100.0, 0.0, -100.0)], 1).to(dtype)
    found = native.attend(arena, 0, q, plan, scale=1.0)[0].float()
    wide = v.to(dtype).float()
    others = [i for i in range(600) if i not in (7, 500)]
    expected = [wide[[7, 500]].mean(0), wide.mean(0), wide[others].mean(0)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=TOLERANCE[dtype])


def tasks(case: Case, *, in_order: bool = False) -> int:
    plan = native.Plan.make(case.items, case.shape, None, in_order=in_order)
    return int(plan.tasks.tasks)  # type: ignore[attr-defined]


@DTYPES
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("window", [None, 700])
def test_long_keys_are_split_between_threads(
    dtype: torch.dtype, seed: int, window: int | None
) -> None:
    case = Case(seed, dtype, dim=16, trim=seed == 1, longest=2)
    above = case.shared(0, 1700 + seed)
    for index, count in enumerate((1, 3, 60)):
        own = case.segment(1100 * (index % 2) + count)
        start = 1700 + seed + own.length - count
        case.items.append(Item((9, index), start, count, own, above))
    case.q = torch.randn(sum(i.count for i in case.items), 4, 16).to(dtype)
    alone = tasks(case)
    with threads(2):
        assert tasks(case) > alone
        together = case.attend(window, None, in_order=True)
    assert torch.equal(case.attend(window, None, in_order=True), together)
    case.compare(window, count=2)


class Request:
    """A request's queries, keys and values, to be laid out in an arena in many ways."""

    def __init__(self, seed: int, tokens: int, dtype: torch.dtype, like: Request | None = None):
        generator = torch.Generator().manual_seed(seed)
        self.q = torch.randn(tokens, 6, 48, generator=generator).to(dtype)
        shape = (2, LAYERS, tokens, 2, 48)
        self.kv = torch.randn(shape, generator=generator).to(dtype)
        self.prefix = 0
        if like is not None:  # shares its first tokens
            self.prefix = tokens // 2
            self.q[: self.prefix] = like.q[: self.prefix]
            self.kv[:, :, : self.prefix] = like.kv[:, :, : self.prefix]

    def __len__(self) -> int:
        return len(self.q)


class World:
    """An arena in which requests lie, for one step."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.rng = random.Random(seed)
        self.pool = PagePool(200, PAGE)
        self.arena = make_arena(2, 48, self.pool.pages, dtype)
        self.items: list[Item] = []
        self.queries: list[Tensor] = []

    def segment(self, request: Request, start: int, stop: int) -> Segment:
        """Tokens [start, stop) of a request, on pages here and there."""
        segment = Segment()
        while segment.length < stop - start:
            first = start + segment.length
            count = min(self.rng.randrange(1, 90), stop - first)
            slots = torch.from_numpy(self.pool.append(segment, count))
            for layer in range(LAYERS):
                k, v = request.kv[:, layer, first : first + count]
                self.arena.write(layer, slots, k, v)
            if self.rng.random() < 0.5:
                self.pool.append(Segment(), 1)
        return segment

    def path(self, request: Request, start: int, stop: int, cuts: Sequence[int]) -> Above:
        """Tokens [start, stop) as segments that begin at ``cuts``, some within a page."""
        above: list[tuple[Segment, int]] = []
        rest, at = self.segment(request, start, stop), start
        for cut in sorted({c for c in cuts if start < c < stop}):
            above.append((self.pool.cut(rest, cut - at), at))
            at = cut
        return (*above, (rest, at)) if stop > start else ()

    def add(
        self, request: Request, first: int, last: int, own: int, above: Above, key: int
    ) -> None:
        """Rows [first, last); the segment that they are in begins at ``own``."""
        item = Item((key,), first, last - first, self.segment(request, own, last), above)
        self.items.append(item)
        self.queries.append(request.q[first:last])

    def attend(self, window: int | None, softcap: float | None) -> list[Tensor]:
        """The result of each item."""
        shape = native.Shape(LAYERS, 6, 2, 48)
        plan = native.Plan.make(self.items, shape, window, in_order=True)
        q = torch.cat(self.queries)
        found = native.attend(self.arena, 1, q, plan, scale=0.3, softcap=softcap)
        return list(found.split([item.count for item in self.items]))


def alone(
    request: Request,
    rows: tuple[int, int],
    *,
    own: int,
    cuts: Sequence[int] = (),
    seed: int = 0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    world = World(seed, request.q.dtype)
    world.add(request, *rows, own, world.path(request, 0, own, cuts), 0)
    return world.attend(window, softcap)[0]


@ISAS
@DTYPES
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_in_order_wherever_segments_and_pages_begin(
    dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    request = Request(1, 230, dtype)
    options = {"window": window, "softcap": softcap}
    expected = alone(request, (200, 230), own=0, **options)  # type: ignore[arg-type]
    rng = random.Random(5)
    for seed in range(6):
        cuts = [rng.randrange(1, 200) for _ in range(seed)]
        own = rng.randrange(201)
        found = alone(request, (200, 230), own=own, cuts=cuts, seed=seed, **options)  # type: ignore[arg-type]
        assert torch.equal(found, expected), (cuts, own)


@ISAS
@DTYPES
@pytest.mark.parametrize("window", [None, 37])
def test_in_order_whatever_the_chunks(dtype: torch.dtype, window: int | None) -> None:
    """A prompt at once, in chunks of several sizes, and token by token as in decoding."""
    request = Request(2, 150, dtype)
    expected = alone(request, (0, 150), own=0, window=window)
    for chunk in (1, 7, 16, 50):
        for first in range(0, 150, chunk if chunk > 1 else 13):
            last = min(first + chunk, 150)
            own = first // 2 if first % 2 else 0
            found = alone(request, (first, last), own=own, seed=chunk, window=window)
            assert torch.equal(found, expected[first:last]), (first, last)


@ISAS
@DTYPES
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("count", [1, 2])
def test_in_order_in_any_company(dtype: torch.dtype, window: int | None, count: int) -> None:
    """Requests that share a prefix, of which some decode and some read a chunk of their prompt."""
    first = Request(3, 180, dtype)
    requests = [first, *(Request(10 + i, 120 + 31 * i, dtype, first) for i in range(5))]
    rows = [(len(r) - [1, 40, 1, 7, 60, 1][i], len(r)) for i, r in enumerate(requests)]
    expected = [alone(r, rows[i], own=0, window=window) for i, r in enumerate(requests)]
    world = World(4, dtype)
    prefix = min(r.prefix for r in requests[1:])
    above = world.path(first, 0, prefix, [21, 48])
    for i, request in enumerate(requests):
        middle = world.path(request, prefix, rows[i][0] - i, [prefix + 9])
        world.add(request, *rows[i], rows[i][0] - i, (*above, *middle), i)
    with threads(count):
        found = world.attend(window, None)
    for mine, wanted in zip(found, expected, strict=True):
        assert torch.equal(mine, wanted)


@ISAS
def test_without_order_the_sums_differ() -> None:
    """The tests above can fail: sums that follow the cuts are not the same bit for bit."""
    request = Request(1, 900, torch.float32)
    found = []
    for own in (0, 700):
        world = World(0, torch.float32)
        world.add(request, 800, 900, own, world.path(request, 0, own, ()), 0)
        plan = native.Plan.make(world.items, native.Shape(LAYERS, 6, 2, 48), None)
        found.append(native.attend(world.arena, 1, world.queries[0], plan, scale=0.3))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)
    assert not torch.equal(*found)


def test_what_fits() -> None:
    like = torch.empty(0)
    assert native.fits(like, 16)
    assert native.fits(like.bfloat16(), 256)
    assert not native.fits(like, 8)
    assert not native.fits(like, 40)
    assert not native.fits(like, 272)
    assert not native.fits(like.half(), 64)
    with using("plain"):
        assert not native.fits(like, 16)
