from __future__ import annotations

import math

import pytest
import torch
from models import check_chosen, check_native, error, make_entries, make_facts, scattered
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kernels import native
from quire.kv.recipes import parse
from quire.kv.store.bfp import BlockFloat, unsort
from quire.kv.store.packed import Packed


def loud_channels(kv_heads: int, head_dim: int) -> Tensor:
    """One channel in eight is 20 times as large; which, differs from head to head."""
    generator = torch.Generator().manual_seed(3)
    loud = torch.ones(kv_heads, head_dim)
    for head in range(kv_heads):
        loud[head, torch.randperm(head_dim, generator=generator)[: head_dim // 8]] = 20
    return loud


def by_loops(x: Tensor, bits: int, group: int, orders: list[list[int]]) -> Tensor:
    """Number after number; ``x`` ``[kv_heads, n, head_dim]``, ``orders`` the channels of heads."""
    found = x.double().clone()
    most = 2 ** (bits - 1) - 1
    for head, order in enumerate(orders):
        for token in found[head]:
            for start in range(0, len(order), group):
                channels = order[start : start + group]
                largest = max(abs(float(token[c])) for c in channels)
                if not largest:
                    continue
                step = 2.0 ** (math.floor(math.log2(largest)) - bits + 2)
                for c in channels:
                    token[c] = max(-most, min(most, round(float(token[c]) / step))) * step
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("kv_heads", "dim", "group", "bits"), [(1, 32, 16, 4), (2, 48, 32, 8), (3, 20, 64, 2)]
)
@pytest.mark.parametrize("n", [1, 21])
def test_against_loops(
    dtype: torch.dtype, kv_heads: int, dim: int, group: int, bits: int, n: int
) -> None:
    loud = loud_channels(kv_heads, dim)
    facts = make_facts(kv_heads, dim, group=4, dtype=dtype, loud=loud)
    known = facts.calibrate().keys
    for layers in (make_entries(facts, n, first=9, loud=loud), scattered(make_entries(facts, n))):
        stored = BlockFloat(bits, group).pack(facts, layers)
        for layer, entries in enumerate(layers):
            rotated = facts.rotate(layer, known[layer].transpose(0, 1), torch.arange(200))
            sizes = rotated.abs().amax(1).tolist()
            orders = [sorted(range(dim), key=lambda c, s=s: -s[c]) for s in sizes]  # type: ignore[misc]
            found = stored.read(layer)
            wide = math.gcd(group, dim)
            torch.testing.assert_close(
                found.keys, by_loops(entries.keys, bits, wide, orders).float()
            )
            torch.testing.assert_close(
                found.values,
                by_loops(entries.values, bits, wide, [list(range(dim))] * kv_heads).float(),
            )
            assert torch.equal(found.positions, entries.positions)
        check_chosen(stored, facts, n)


def test_sorting_changes_no_number_and_no_product() -> None:
    loud = loud_channels(2, 64)
    facts = make_facts(2, 64, loud=loud)
    for back in facts.once(unsort):
        assert torch.equal(back @ back.transpose(1, 2), torch.eye(64).expand(2, -1, -1))
        keys, q = torch.randn(2, 2, 30, 64)
        assert torch.equal(keys @ back.transpose(1, 2) @ back, keys)
        turned = (keys @ back.transpose(1, 2), q @ back.transpose(1, 2))
        torch.testing.assert_close((turned[0] * turned[1]).sum(-1), (keys * q).sum(-1))
    assert facts.once(unsort) is facts.once(unsort)  # reads of all nodes go into one plan


def test_the_largest_channels_come_first() -> None:
    loud = loud_channels(2, 64)
    facts = make_facts(2, 64, loud=loud)
    first = facts.once(unsort)[0][:, :8].sum(1)  # the channels of the first eight rows
    # RoPE has turned a large channel and its partner into each other.
    pair = loud.maximum(loud.roll(32, -1))
    assert (pair[first.bool()] == 20).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_sorted_keys_lose_less(bits: int) -> None:
    """Unless a group is a whole head: the same numbers then share an exponent."""
    loud = loud_channels(2, 128)
    facts = make_facts(2, 128, loud=loud)
    layers = make_entries(facts, 100, loud=loud)
    errors = {
        (group, sort): error(BlockFloat(bits, group, sort).pack(facts, layers), layers)
        for group in (16, 32, 64, 128)
        for sort in (True, False)
    }
    for group in (16, 32, 64):
        assert errors[group, True] < 0.9 * errors[group, False]
    assert errors[128, True] == pytest.approx(errors[128, False])


def test_channels_that_are_small_keep_their_bits() -> None:
    """What the order is for: the small channels, which share no exponent with large ones."""
    loud = loud_channels(2, 128)
    facts = make_facts(2, 128, loud=loud)
    layers = make_entries(facts, 100, loud=loud)
    small = (loud.maximum(loud.roll(64, -1)) == 1)[:, None].expand(-1, 100, -1)
    missed = {}
    for sort in (True, False):
        found = BlockFloat(4, 32, sort).pack(facts, layers).read(0).keys
        missed[sort] = float((found - layers[0].keys)[small].square().mean())
    assert missed[True] < 0.25 * missed[False]


def test_constants_and_zeros() -> None:
    facts = make_facts(1, 32)
    for number in (0.0, -2.5, 3e-38, 1e38):
        layers = make_entries(facts, 20)
        for entries in layers:
            entries.keys.fill_(number)
        found = BlockFloat(8).pack(facts, layers).read(0).keys
        torch.testing.assert_close(found, layers[0].keys, rtol=0.02, atol=1e-37)


@pytest.mark.parametrize(("group", "bytes_"), [(32, 68), (64, 66)])
def test_bytes(group: int, bytes_: int) -> None:
    """4.25 bits a number in groups of 32, 4.125 in groups of 64; no matter in which order."""
    facts = make_facts(8, 128, dtype=torch.bfloat16)
    layers = make_entries(facts, 4096)
    for sort in (True, False):
        stored = BlockFloat(group=group, sort=sort).pack(facts, layers)
        assert stored.nbytes == 2 * 4096 * 8 * 2 * bytes_


@pytest.mark.skipif(not native.available()[1:], reason="the native extension is missing")
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 1e-3), (4, 0.05)])
def test_the_native_kernels_read_it(bits: int, tolerance: float) -> None:
    for dtype, dim, sort in (
        (torch.bfloat16, 128, True),
        (torch.float32, 64, False),
        (torch.float32, 80, True),
    ):
        facts = make_facts(2, dim, group=4, dtype=dtype)
        layers = make_entries(facts, 333, first=5)
        stored = BlockFloat(bits, sort=sort).pack(facts, layers)
        assert isinstance(stored, Packed)
        check_native(stored, 333, facts, tolerance)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="2, 4 or 8 bits"):
        parse("bfp(bits=6)")
    with pytest.raises(InvalidRequestError, match="at least 1"):
        parse("bfp(group=0)")
    assert parse("bfp(bits=8,group=64,sort=false)").store == BlockFloat(8, 64, False)
