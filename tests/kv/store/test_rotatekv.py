from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from models import (
    CALIBRATED,
    check_chosen,
    check_native,
    error,
    make_entries,
    make_facts,
    scattered,
)
from test_bfp import loud_channels
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kernels import native
from quire.kv.method import Entries, Facts, Joined, Plain
from quire.kv.recipes import parse
from quire.kv.store.hadamard import hadamard
from quire.kv.store.packed import Packed
from quire.kv.store.rotatekv import RotateKV, over_heads, within_heads


def signs(size: int) -> Tensor:
    """A Hadamard matrix by its definition, float64: the sign is the parity of shared bits."""
    entry = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(entry, dtype=torch.float64) / size**0.5


def rounded(row: list[float], bits: int, clip: float, scales: torch.dtype) -> list[float]:
    low, high = min(row), max(row)
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    low, high = middle - half, middle + half
    codes = 2**bits - 1
    scale = float(torch.tensor((high - low) / codes).to(scales))
    zero = float(torch.tensor(low + 2 ** (bits - 1) * scale).to(scales))
    found = []
    for x in row:
        inside = min(max(x, low), high)
        code = round((inside - zero) / scale) + 2 ** (bits - 1) if scale else 0
        found.append((min(max(code, 0), codes) - 2 ** (bits - 1)) * scale + zero)
    return found


def in_groups(row: list[float], group: int, *options: object) -> list[float]:
    found: list[float] = []
    for start in range(0, len(row), group):
        found += rounded(row[start : start + group], *options)  # type: ignore[arg-type]
    return found


def by_loops(facts: Facts, layers: list[Entries], layer: int, method: RotateKV) -> list[Tensor]:
    """Keys and values as the paper has them, token by token: head_dim a power of two."""
    heads, dim = facts.kv_heads, facts.head_dim
    together = next(h for h in (4, 2, 1) if heads % h == 0)
    turn, one = signs(together * dim), signs(dim)
    clip = 0.8 if method.bits == 2 else 1.0
    options = (method.bits, clip, facts.dtype)

    def mixed(rows: Tensor) -> Tensor:  # [n, heads * dim]
        parts = rows.split(together * dim, dim=1)
        return torch.cat([part @ turn for part in parts], dim=1)

    sums = mixed(facts.calibrate().keys[layer].double().flatten(1)).sum(0)
    order = sums.argsort()
    e = layers[layer]
    keys = facts.unrotate(layer, e.keys.float(), e.positions).double()
    rows = mixed(keys.transpose(0, 1).flatten(1))[:, order]
    wide = math.gcd(method.group, heads * dim)
    coded = torch.tensor([in_groups(row, wide, *options) for row in rows.tolist()])
    plain = torch.empty_like(rows)
    plain[:, order] = coded.double()
    back = mixed(plain).unflatten(1, (heads, dim)).transpose(0, 1)
    wide = math.gcd(method.group, dim)
    values = torch.stack(
        [
            torch.tensor([in_groups(row, wide, *options) for row in head.tolist()]).double() @ one
            for head in e.values.double() @ one
        ]
    )
    found = [facts.rotate(layer, back.float(), e.positions).double(), values]
    for mine, exact in zip(found, (e.keys, e.values), strict=True):
        sink = e.positions < method.sinks
        sink = (torch.arange(sink.shape[1]) < int(sink.cumprod(-1).sum(-1).max())).expand_as(sink)
        mine[sink] = exact.double()[sink]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 32), (4, 16), (6, 16)])
@pytest.mark.parametrize(("bits", "n"), [(2, 21), (4, 3), (8, 1), (2, 37)])
def test_against_loops(dtype: torch.dtype, kv_heads: int, dim: int, bits: int, n: int) -> None:
    bias = 3 * torch.randn(kv_heads, dim, generator=torch.Generator().manual_seed(2))
    facts = make_facts(kv_heads, dim, group=4, dtype=dtype, bias=bias)
    method = RotateKV(bits, group=32)
    begin, later = (make_entries(facts, n, first=at, bias=bias) for at in (0, 9))
    for layers in (begin, later, scattered(begin)):
        stored = method.pack(facts, layers)
        for layer, entries in enumerate(layers):
            found = stored.read(layer)
            assert torch.equal(found.positions, entries.positions)
            wanted = by_loops(facts, layers, layer, method)
            for mine, numbers in zip((found.keys, found.values), wanted, strict=True):
                off = (mine.double() - numbers).norm(dim=-1) / numbers.norm(dim=-1)
                # A number in the middle of two codes changes all that it is mixed with.
                assert (off > 1e-4).double().mean() <= 0.1
                assert off.max() < 2.0**-bits
        check_chosen(stored, facts, n)


def test_the_matrices() -> None:
    for size, largest, width in (
        (1, None, 1),
        (64, None, 64),
        (80, None, 16),
        (8, 4, 4),
        (6, 4, 2),
    ):
        found = hadamard(size, largest)
        torch.testing.assert_close(found @ found, torch.eye(size))
        assert torch.equal(found, found.T)
        assert int((found[0] != 0).sum()) == width
        torch.testing.assert_close(found[:width, :width].double(), signs(width))


@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 80), (3, 96), (5, 16), (8, 24)])
@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("n", [1, 4, 5, 33])
def test_any_shape_comes_back(kv_heads: int, dim: int, rope: str, n: int) -> None:
    """With 8 bits nearly nothing is lost, wherever turns and orders have taken the numbers."""
    bias = 2 * torch.randn(kv_heads, dim, generator=torch.Generator().manual_seed(2))
    facts = make_facts(kv_heads, dim, bias=bias)
    for layers in (make_entries(facts, n), scattered(make_entries(facts, n, first=40))):
        stored = RotateKV(8, rope=rope, group=16).pack(facts, layers)
        for layer, entries in enumerate(layers):
            found = stored.read(layer)
            for mine, x in ((found.keys, entries.keys), (found.values, entries.values)):
                assert (mine - x).abs().max() < 0.1
            assert torch.equal(found.positions, entries.positions)
        check_chosen(stored, facts, n)


def test_the_first_tokens_stay_exact() -> None:
    for rope in ("pre", "post"):
        facts = make_facts(2, 32, dtype=torch.bfloat16)
        layers = make_entries(facts, 50)
        stored = RotateKV(rope=rope, sinks=3).pack(facts, layers)
        assert isinstance(stored, Joined)
        assert stored.sizes == (3, 47)
        found = stored.read(1)
        assert torch.equal(found.keys[:, :3], layers[1].keys[:, :3].float())
        assert torch.equal(found.values[:, :3], layers[1].values[:, :3].float())
        assert not torch.equal(found.keys[:, 3], layers[1].keys[:, 3].float())
        later = make_entries(facts, 50, first=3)
        assert not isinstance(RotateKV(rope=rope, sinks=3).pack(facts, later), Joined)
        assert not isinstance(RotateKV(rope=rope, sinks=0).pack(facts, layers), Joined)
        assert isinstance(RotateKV(rope=rope, sinks=80).pack(facts, layers), Plain)
        # A selection may have left one head more of the first tokens than another.
        apart = [replace(e, positions=e.positions + torch.tensor([[0], [2]])) for e in layers]
        kept = RotateKV(rope=rope, sinks=3).pack(facts, apart)
        assert isinstance(kept, Joined)
        assert kept.sizes == (3, 47)


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_rotated_keys_lose_less(rope: str) -> None:
    loud = loud_channels(4, 64)
    facts = make_facts(4, 64, loud=loud)
    layers = make_entries(facts, 100, loud=loud)
    errors = {
        rotate: error(RotateKV(rope=rope, rotate=rotate, sinks=0).pack(facts, layers), layers)
        for rotate in (True, False)
    }
    assert errors[True] < 0.5 * errors[False]


def test_reordered_keys_lose_less() -> None:
    """Where channels have their own middles, alike ones share a group."""
    bias = 4 * torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    facts = make_facts(4, 64, bias=bias)
    layers = make_entries(facts, 100, bias=bias)
    errors = {
        (rope, sort): error(
            RotateKV(rope=rope, sort=sort, group=64, sinks=0).pack(facts, layers), layers
        )
        for rope in ("pre", "post")
        for sort in (True, False)
    }
    assert errors["pre", True] < 0.5 * errors["pre", False]
    # After RoPE, a head is one group: there is nothing to put together.
    assert errors["post", True] == errors["post", False]
    assert errors["pre", True] < 0.5 * errors["post", True]


def test_channels_that_are_always_large() -> None:
    """Few, as biases make them: rotation and order each help, and together they help most."""
    generator = torch.Generator().manual_seed(2)
    bias = 30 * torch.randn(4, 128, generator=generator)
    bias *= torch.rand(4, 128, generator=generator) < 0.05
    facts = make_facts(4, 128, bias=bias)
    layers = make_entries(facts, 100, bias=bias)
    errors = {
        (rotate, sort): error(
            RotateKV(rotate=rotate, sort=sort, sinks=0).pack(facts, layers), layers
        )
        for rotate in (True, False)
        for sort in (True, False)
    }
    assert errors[True, True] < 0.2 * min(errors[True, False], errors[False, True])
    assert max(errors[True, False], errors[False, True]) < 0.3 * errors[False, False]
    after = RotateKV(rope="post", sinks=0).pack(facts, layers)
    assert errors[True, True] < 0.3 * error(after, layers) < 0.3 * errors[False, False]


def test_two_bits_are_better_for_being_clipped() -> None:
    facts = make_facts(4, 128)
    layers = make_entries(facts, 100)
    errors = [
        error(RotateKV(clip=clip, sinks=0).pack(facts, layers), layers) for clip in (None, 1.0)
    ]
    assert errors[0] < 0.8 * errors[1]
    assert error(RotateKV(clip=0.8, sinks=0).pack(facts, layers), layers) == errors[0]


def test_constants_and_zeros() -> None:
    facts = make_facts(2, 32)
    for rope in ("pre", "post"):
        for number in (0.0, -2.5):
            layers = make_entries(facts, 20)
            for entries in layers:
                entries.keys.fill_(number)
                entries.values.fill_(number)
            found = RotateKV(8, rope=rope).pack(facts, layers).read(0)
            torch.testing.assert_close(found.keys, layers[0].keys, rtol=0, atol=0.3)
            torch.testing.assert_close(found.values, layers[0].values, rtol=0, atol=0.3)


@pytest.mark.parametrize("rope", ["pre", "post"])
def test_bytes(rope: str) -> None:
    """72 a token and head, keys and values; the first tokens have 512 and their positions' 8."""
    facts = make_facts(8, 128, dtype=torch.bfloat16)
    stored = RotateKV(rope=rope).pack(facts, make_entries(facts, 4096))
    assert stored.nbytes == 2 * 8 * (4096 * 72 + 4 * (512 + 8))  # packed in whole pages


@pytest.mark.skipif(not native.available()[1:], reason="the native extension is missing")
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 1e-3), (4, 0.05), (2, 0.05)])
def test_the_native_kernels_read_what_is_rotated_after_rope(bits: int, tolerance: float) -> None:
    for dtype, dim, group, first in (
        (torch.bfloat16, 128, 128, 0),
        (torch.float32, 64, 32, 5),
        (torch.float32, 80, 128, 0),
    ):
        facts = make_facts(2, dim, group=4, dtype=dtype)
        layers = make_entries(facts, 333, first=first)
        stored = RotateKV(bits, group, rope="post").pack(facts, layers)
        assert isinstance(stored, Joined if not first else Packed)
        check_native(stored, 333, facts, tolerance)


def test_turns_are_made_once() -> None:
    facts = make_facts(2, 64)
    assert facts.once(within_heads, True, True) is facts.once(within_heads, True, True)
    assert facts.once(over_heads, True, False) is not facts.once(over_heads, True, True)
    assert len(facts.calibrate().keys[0]) == CALIBRATED


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("rotatekv(bits=3)", "whole bytes"),
        ("rotatekv(clip=1.5)", "share"),
        ("rotatekv(clip=0)", "share"),
        ("rotatekv(rope=none)", "str"),
        ("rotatekv(rope=both)", "pre or post"),
        ("rotatekv(sinks=-1)", "at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        parse(text)
    assert parse("rotatekv(bits=4,rope=post)").store == RotateKV(4, rope="post")
