"""Normalisation, gate, and rotation with the KV append, against PyTorch and exact arithmetic."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import threads, using
from torch import Tensor

from quire.kernels import native
from quire.kernels.kv import rotate_append
from quire.kernels.layers import ACTIVATIONS, widen
from quire.kv.arena import TiledArena
from quire.models import blocks, rope
from quire.models.blocks import Normalise

# The kernels compute in float32 and round once. Half a unit in the last place is 2^-8 of a bfloat16
# number and 2^-24 of a float32 one; float32 has a few roundings more, and sums of squares.
RELATIVE = {torch.float32: 2**-20, torch.bfloat16: 1.01 * 2**-8}
# PyTorch's own code rounds a bfloat16 result up to three times.
THREE_ROUNDINGS = {torch.float32: 2**-20, torch.bfloat16: 3.1 * 2**-8}

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
pytestmark = pytest.mark.usefixtures("isa")


def close(found: Tensor, expected: Tensor, rtol: float, atol: float = 1e-30) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


@DTYPES
@pytest.mark.parametrize("width", [1, 7, 16, 33, 576])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("kind", ["rms", "rms+1"])
def test_rms_norm(dtype: torch.dtype, width: int, rows: int, kind: str) -> None:
    torch.manual_seed(width + rows)
    x = (3 * torch.randn(rows, width)).to(dtype)
    norm = Normalise(torch.randn(width).to(dtype), None, 1e-5, kind)  # type: ignore[arg-type]
    found = norm(x)
    assert found.shape == x.shape
    assert found.dtype == dtype
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    exact = exact * (norm.weight.double() + (kind == "rms+1"))
    close(found, exact, RELATIVE[dtype])
    with using("plain"):
        close(found, norm(x), THREE_ROUNDINGS[dtype])


@DTYPES
def test_rms_norm_of_heads_in_a_wider_matrix(dtype: torch.dtype) -> None:
    """As q and k come out of the joint product: rows that are not contiguous."""
    torch.manual_seed(0)
    norm = Normalise(torch.randn(20).to(dtype), None, 1e-6, "rms")
    heads = torch.randn(6, 100).to(dtype)[:, 20:80].view(6, 3, 20)
    found = norm(heads)
    assert found.is_contiguous()
    with using("plain"):
        close(found, norm(heads), THREE_ROUNDINGS[dtype])


def test_rms_norm_of_zeros_and_large_numbers() -> None:
    norm = Normalise(torch.ones(33), None, 1e-6, "rms")
    assert torch.equal(norm(torch.zeros(2, 33)), torch.zeros(2, 33))
    close(norm(torch.full((1, 33), -1e15)), torch.full((1, 33), -1.0), 2**-20)


def test_rms_norm_on_two_threads() -> None:
    torch.manual_seed(0)
    norm, x = Normalise(torch.randn(576), None, 1e-5, "rms"), torch.randn(301, 576)
    one = norm(x)
    with threads(2):
        assert torch.equal(norm(x), one)


def exact_gate(wide: Tensor, activation: str) -> Tensor:
    half, up = wide.double().chunk(2, dim=-1)
    return blocks.ACTIVATIONS[activation](half) * up


@DTYPES
@pytest.mark.parametrize("width", [1, 7, 16, 33, 200])
@pytest.mark.parametrize("activation", sorted(blocks.ACTIVATIONS))
def test_gate(dtype: torch.dtype, width: int, activation: str) -> None:
    torch.manual_seed(width)
    wide = (3 * torch.randn(5, 2 * width)).to(dtype)
    found = blocks.gate(wide, activation)
    assert found.shape == (5, width)
    assert found.dtype == dtype
    # The kernels' erf is exact to 1.5e-7, to be multiplied with numbers up to about 100.
    close(found, exact_gate(wide, activation), RELATIVE[dtype], 2e-5)
    with using("plain"):
        close(found, blocks.gate(wide, activation), THREE_ROUNDINGS[dtype], 2e-5)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_of_extreme_numbers(dtype: torch.dtype, activation: str) -> None:
    numbers = [
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        1e-4,
        -1e-4,
        4.0,
        -4.0,
        12.0,
        -12.0,
        90.0,
        -90.0,
        1e4,
        -1e4,
    ]
    half = torch.tensor(numbers)
    wide = torch.cat([half, torch.ones_like(half)])[None].to(dtype)
    # -12 * Phi(-12) is 1e-32; 1 + erf leaves the rounding of 1, times 12.
    close(blocks.gate(wide, activation), exact_gate(wide, activation), RELATIVE[dtype], 3e-6)


def test_gate_of_no_rows_and_on_two_threads() -> None:
    torch.manual_seed(0)
    assert blocks.gate(torch.empty(0, 34), "silu").shape == (0, 17)
    wide = torch.randn(100, 1030)
    one = blocks.gate(wide, "gelu")
    with threads(2):
        assert torch.equal(blocks.gate(wide, "gelu"), one)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 33), (3, 40_000)])
def test_widen(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = (1e3 * torch.randn(shape)).bfloat16()
    x.view(-1)[:1] = float("-inf")
    assert torch.equal(widen(x), x.float())
    assert widen(x).dtype == torch.float32
    with threads(2):
        assert torch.equal(widen(x), x.float())
    assert torch.equal(widen(x.float()), x.float())


def views(matrix: Tensor, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as they lie in the result of one product, with 8 numbers between tokens."""
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim, 8]
    q, k, v, _ = torch.split(matrix, sizes, dim=-1)
    return tuple(t.view(len(t), -1, dim) for t in (q, k, v))  # type: ignore[return-value]


@DTYPES
@pytest.mark.parametrize(
    ("dim", "rotated"),
    [
        (16, 16),
        (16, 0),
        (32, 8),
        (32, 20),
        (48, 48),
        (64, 2),
        (64, 64),
        (80, 32),
        (80, 80),
        (112, 28),
    ],
)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 3)])
def test_rotate_append(dtype: torch.dtype, dim: int, rotated: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(dim + rotated)
    tokens, pages = 37, 6
    matrix = torch.randn(tokens, (heads[0] + 2 * heads[1]) * dim + 8).to(dtype)
    before = matrix.clone()
    angles = torch.randn(tokens, rotated // 2) * 3
    rotation = (1.2 * angles.cos(), 1.2 * angles.sin()) if rotated else None
    arena = TiledArena.make(2, heads[1], dim, 16 * pages, dtype)
    arena.keys.normal_()
    arena.values.normal_()
    untouched = TiledArena(arena.keys.clone(), arena.values.clone())
    slots = torch.randperm(16 * pages)[:tokens]
    q, k, v = views(matrix, *heads, dim)
    rotate_append(q, k, v, rotation, slots, arena.keys[1], arena.values[1])

    old_q, old_k, old_v = views(before, *heads, dim)
    if rotation is None:
        assert torch.equal(matrix, before)
    for found, old in ((q, old_q), (k, old_k)):
        if rotation is not None:
            exact = rope.rotate(old.double(), *rotation)
            # A result is the difference of two products, each up to 10.
            close(found, exact, RELATIVE[dtype], 4e-6)
            assert torch.equal(found[..., rotated:], old[..., rotated:])
    assert torch.equal(v, old_v)
    assert torch.equal(matrix[:, -8:], before[:, -8:])

    # The arena has what PyTorch would have put there, and nothing else has changed.
    for isa in ("plain", native.active()):
        with using(isa):
            untouched.write(1, slots, k, v)
            assert torch.equal(arena.keys, untouched.keys)
            assert torch.equal(arena.values, untouched.values)
            keys, values = arena.read(1, slots)
        assert torch.equal(keys, k.transpose(0, 1))
        assert torch.equal(values, v.transpose(0, 1))


def test_rotate_append_near_rope() -> None:
    """With sines rounded to bfloat16 as well, PyTorch's result lies a few roundings apart."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(9, n, 32).bfloat16() for n in (4, 2, 2))
    angles = torch.randn(9, 16)
    rotation = (angles.cos(), angles.sin())
    expected = rope.rotate(q, *rotation)
    arena = TiledArena.make(1, 2, 32, 16, torch.bfloat16)
    rotate_append(q, k, v, rotation, torch.arange(9), arena.keys[0], arena.values[0])
    close(q, expected, 2**-7, 2**-5)


def test_rotate_append_of_no_tokens() -> None:
    arena = TiledArena.make(1, 1, 16, 16, torch.float32)
    empty = torch.empty(0, 1, 16)
    slots = torch.empty(0, dtype=torch.int64)
    rotate_append(empty, empty, empty, None, slots, arena.keys[0], arena.values[0])
    assert not arena.keys.any()


def test_the_choice_of_kernels() -> None:
    with pytest.raises(ValueError, match="No kernels for 'avx1024' here"):
        native.use("avx1024")
    x = torch.empty(0)
    assert native.fits(x)
    assert not native.fits(x.half())
    assert not native.fits(x.double())
    with using("plain"):
        assert native.active() == "plain"
        assert not native.fits(x)
