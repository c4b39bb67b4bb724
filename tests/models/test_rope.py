from __future__ import annotations

import pytest
import torch

from quire.models.rope import rotate, tables
from quire.models.spec import Rope


@pytest.mark.parametrize("position", [0, 1, 63, 64, 100, 250])
def test_dynamic_scaling_is_position_wise(position: int) -> None:
    """Position p is rotated as in a sequence of p + 1 tokens."""
    rope = Rope(10000.0, 8, "dynamic", (("factor", 4.0),), original=64)
    cos, _ = tables(rope, torch.tensor([position]))
    length = max(position + 1, 64)
    base = 10000.0 * (4.0 * length / 64 - 3.0) ** (8 / 6)
    expected = (position * base ** (-torch.arange(0, 8, 2) / 8)).cos()
    torch.testing.assert_close(cos[0], expected, rtol=1e-4, atol=1e-4)


def test_longrope_takes_the_long_factors_only_beyond_the_original_context() -> None:
    factors = (("short_factor", (1.0, 1.0)), ("long_factor", (2.0, 4.0)), ("factor", 4.0))
    short = Rope(10.0, 4, "longrope", factors, original=64, context=64)
    long = Rope(10.0, 4, "longrope", factors, original=64, context=65)
    at = torch.tensor([3])
    (cos_short, _), (cos_long, _) = tables(short, at), tables(long, at)
    amplitude = (1 + torch.log(torch.tensor(4.0)) / torch.log(torch.tensor(64.0))).sqrt()
    plain = 3 * torch.tensor([1.0, 10.0**-0.5])
    torch.testing.assert_close(cos_short[0], plain.cos() * amplitude)
    torch.testing.assert_close(cos_long[0], (plain / torch.tensor([2.0, 4.0])).cos() * amplitude)


def test_rotation_keeps_lengths_and_the_unrotated_part() -> None:
    x = torch.randn(5, 2, 12)
    cos, sin = tables(Rope(100.0, 8), torch.arange(5))
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[0], x[0])
