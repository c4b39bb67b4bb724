"""Keys and values that lie in few dimensions, and the facts of a model that has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import toy
from quire.kv.method import Calibration, Entries, Facts

ROPE = 10000.0  # the base that `toy.make_facts` has


def make_facts(
    kv_heads: int = 2,
    layers: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    group: int = 1,
    calibration: Calibration | None = None,
) -> Facts:
    known = calibration or Calibration([], [], [])
    heads = kv_heads * group
    return toy.make_facts(heads, kv_heads, layers, head_dim, dtype, calibrate=lambda: known)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE on ``x`` ``[..., n, d]`` in float64: pairs of the two halves as complex numbers."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    speed = ROPE ** -(torch.arange(half, dtype=torch.float64) / half)
    turned = pairs * torch.polar(torch.ones(()).double(), positions[..., None] * speed)
    return torch.cat([turned.real, turned.imag], dim=-1)


def spread(
    n: int, width: int, rank: int, *, noise: float = 0.0, seed: int = 0, tokens: int | None = None
) -> Tensor:
    """``[n, width]`` of ``rank`` and noise. ``tokens``: the seed of the tokens' features."""
    drawn = torch.Generator().manual_seed(seed if tokens is None else tokens)
    features = torch.randn(n, rank, generator=drawn)
    generator = torch.Generator().manual_seed(seed + 1)
    basis = torch.randn(rank, width, generator=generator) / rank**0.5
    return features @ basis + noise * torch.randn(n, width, generator=generator)


def headed(x: Tensor, kv_heads: int) -> Tensor:
    """``[n, kv_heads * d]`` as ``[kv_heads, n, d]``."""
    return x.view(len(x), kv_heads, -1).transpose(0, 1).contiguous()


def entries_of(facts: Facts, keys: Tensor, values: Tensor, positions: Tensor) -> Entries:
    """Straight keys and values ``[n, kv_heads * d]`` as entries: rotated, in the model's dtype."""
    at = positions.expand(facts.kv_heads, -1)
    turned = rotated(headed(keys, facts.kv_heads), at)
    return Entries(turned.to(facts.dtype), headed(values, facts.kv_heads).to(facts.dtype), at)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative: of the norms."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def errors(found: Sequence[Entries], wanted: Sequence[Entries]) -> tuple[float, float]:
    """Of the keys and of the values of all layers."""
    return (
        error(torch.stack([e.keys for e in found]), torch.stack([e.keys for e in wanted])),
        error(torch.stack([e.values for e in found]), torch.stack([e.values for e in wanted])),
    )
