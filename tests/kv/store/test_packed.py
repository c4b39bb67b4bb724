"""Packed entries against the definition of their numbers, one at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.kv.method import Entries, gather
from quire.kv.store.packed import Codes, Format, Packed

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "exponent": torch.uint8}


def number(codes: Codes, head: int, token: int, channel: int) -> tuple[int, float, float]:
    """Code, scale and middle of one number, found byte by byte as `Codes` describes it."""
    form = codes.form
    place, inner = token % 16, channel % 16
    column, inner = (inner, place) if codes.values else (place, inner)
    step, i = inner // 4, inner % 4
    row, within = divmod(step, 8 // form.bits)
    byte = int(codes.codes[head, token // 16, channel // 16, row, column, i])
    code = byte >> (form.bits * within) & form.levels
    if form.along_tokens:
        at = (head, token // form.group, channel)
    else:
        at = (head, channel // form.group, token)
    raw = codes.scale[at]
    scale = 2.0 ** (int(raw) - 127) if codes.scale.dtype == torch.uint8 else float(raw)
    if codes.scale.dtype == torch.uint8 and int(raw) == 0:
        scale = 0.0
    return code, scale, 0.0 if codes.middle is None else float(codes.middle[at])


def forms() -> st.SearchStrategy[Format]:
    def make(bits: int, group: int, along_tokens: bool, scales: str, centred: bool) -> Format:
        centred = centred or scales == "exponent"
        return Format(bits, group, along_tokens, DTYPES[scales], centred)

    return st.builds(
        make,
        st.sampled_from([2, 4, 8]),
        st.sampled_from([8, 16, 32]),
        st.booleans(),
        st.sampled_from(list(DTYPES)),
        st.booleans(),
    )


def numbers(seed: int, heads: int, n: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, n, dim, generator=generator)
    return x * torch.randn(heads, 1, dim, generator=generator).exp() + 3


@settings(max_examples=60, deadline=None)
@given(
    form=forms(),
    values=st.booleans(),
    n=st.integers(1, 70),
    dim=st.sampled_from([32, 64, 96]),
    seed=st.integers(0, 100),
)
def test_every_number_is_where_it_is_said_to_be(
    form: Format, values: bool, n: int, dim: int, seed: int
) -> None:
    x = numbers(seed, 2, n, dim)
    codes = Codes.make(x, form, form.block, values=values)
    assert codes.pages * 16 == -(-n // form.block) * form.block
    found = codes.read()
    assert found.shape == x.shape
    half = 2 ** (form.bits - 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        head, token, channel = (
            int(torch.randint(size, (), generator=generator)) for size in (2, n, dim)
        )
        code, scale, middle = number(codes, head, token, channel)
        assert 0 <= code <= form.levels
        expected = (code - half) * scale + middle
        assert float(found[head, token, channel]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        # As near as the format allows, but where the largest or smallest number lies beyond a
        # rounded middle, or the centre leaves out a code.
        error = abs(float(x[head, token, channel]) - expected)
        rounding = 2**-8 * (abs(middle) + half * scale) if codes.scale.dtype != torch.float32 else 0
        if 0 < code < form.levels and (code > 1 or not form.centred):
            assert error <= 0.5001 * scale + 1e-6
        elif form.scales != torch.uint8:
            assert error <= (0.5001 + 0.5) * scale + 2 * rounding + 1e-6


@settings(max_examples=40, deadline=None)
@given(form=forms(), values=st.booleans(), n=st.integers(1, 50), seed=st.integers(0, 100))
def test_chosen_entries_are_the_same(form: Format, values: bool, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = Codes.make(torch.randn(3, n, 32), form, form.block, values=values)
    index = torch.randint(n, (4, 3, 7))
    assert torch.equal(codes.read(index), codes.read()[torch.arange(3)[:, None], index])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("along_tokens", [True, False])
def test_numbers_that_are_all_the_same(bits: int, along_tokens: bool) -> None:
    for centred in (False, True):
        form = Format(bits, 16, along_tokens, torch.float32, centred)
        for x in (torch.zeros(1, 16, 16), torch.full((1, 16, 16), -2.5)):
            found = Codes.make(x, form, 16, values=False).read()
            torch.testing.assert_close(found, x, rtol=1e-5, atol=0)


def test_block_floating_point() -> None:
    """4 bits with a sign: a step of 2^(e - 2) below a largest number of 2^e to 2^(e + 1)."""
    form = Format(4, 16, False, torch.uint8, True)
    x = torch.zeros(1, 16, 16)
    x[0, 0, :8] = torch.tensor([5.0, -7.0, 1.0, 0.4, 3.5, -1.5, 6.4, 7.9])
    found = Codes.make(x, form, 16, values=True).read()[0, 0, :8]
    assert found.tolist() == [5.0, -7.0, 1.0, 0.0, 4.0, -2.0, 6.0, 7.0]


def entries(n: int, dim: int, first: int = 0, heads: int = 2) -> Entries:
    torch.manual_seed(n)
    keys, values = torch.randn(2, heads, n, dim)
    return Entries(keys, values, torch.arange(first, first + n).expand(heads, -1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes(bits: int) -> None:
    """Codes, and a scale and a middle of two bytes for each group: nothing else."""
    keys = Format(bits, 32, True, torch.bfloat16)
    values = Format(bits, 32, False, torch.bfloat16)
    packed = Packed.make([entries(256, 64), entries(256, 64)], keys, values)
    numbers = 2 * 2 * 2 * 256 * 64  # layers, heads, keys and values
    assert packed.nbytes == numbers * bits // 8 + numbers // 32 * 4


def test_positions() -> None:
    form = Format(8, 16, True, torch.float32)
    neighbours = Packed.make([entries(40, 32, 7)] * 3, form, form)
    assert neighbours.positions == 7
    assert neighbours.read(1).positions.tolist() == [list(range(7, 47))] * 2
    index = torch.tensor([[[3, 0], [39, 5]]])
    assert neighbours.read(2, index).positions.tolist() == [[[10, 7], [46, 12]]]

    apart = entries(40, 32)
    apart = Entries(apart.keys, apart.values, apart.positions * 3)
    scattered = Packed.make([apart] * 2, form, form)
    assert torch.equal(scattered.read(1).positions, apart.positions)
    assert torch.equal(scattered.read(0, index).positions, gather(apart, index).positions)
    assert scattered.nbytes == neighbours.nbytes * 2 // 3 + 2 * 2 * 40 * 4


def test_what_is_turned_is_turned_back() -> None:
    """A rotation before rounding leaves its error where it is, not the numbers turned."""
    turn = torch.linalg.qr(torch.randn(2, 32, 32))[0]
    plain = entries(64, 32)
    turned = Entries(plain.keys @ turn, plain.values @ turn, plain.positions)
    form = Format(8, 32, False, torch.float32)
    back = (turn.transpose(1, 2),)
    packed = Packed.make([turned], form, form, key_back=back, value_back=back)
    for index in (None, torch.tensor([[[5, 2], [1, 63]]])):
        expected = plain if index is None else gather(plain, index)
        found = packed.read(0, index)
        for a, b in ((found.keys, expected.keys), (found.values, expected.values)):
            assert (a - b).abs().max() < math.sqrt(32) * 6 / 255


def test_what_the_kernels_can_read() -> None:
    wide, narrow = entries(32, 64), entries(32, 24)
    by_channel, by_token = (Format(4, 32, along, torch.bfloat16) for along in (True, False))
    whole = Packed.make([wide] * 3, by_channel, by_token).addresses
    assert whole is not None
    assert whole.shape == (3, 2, 8)
    assert Packed.make([narrow], by_channel, by_channel).addresses is None
    halves = Format(4, 8, False, torch.bfloat16)
    assert Packed.make([wide], by_channel, halves).addresses is None


def test_exponents_have_no_middles() -> None:
    with pytest.raises(ValueError, match="centred"):
        Format(4, 16, True, torch.uint8).fit(torch.ones(1, 16, 16))
