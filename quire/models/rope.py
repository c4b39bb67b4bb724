"""Rotary position embeddings and their scalings.

``default`` (arXiv 2104.09864), ``linear`` (2306.15595), ``dynamic`` NTK, ``yarn`` (2309.00071),
``llama3`` (Llama 3.1), ``longrope`` (2402.13753). Two choices differ from a library that sees one
sequence at a time, because KV here is shared and never rotated again:

- ``dynamic``: position p is rotated with the base for a sequence of p + 1 tokens. Within the
  original context, which is the default one, this is the plain embedding.
- ``longrope``: the short factors hold up to the original context, which is also the default
  context; an engine run with a longer context uses the long factors for every position.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from quire.models.spec import Rope

REQUIRED: dict[str, tuple[str, ...]] = {  # options that each kind must be given
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def tables(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 ``[tokens, dim / 2]``, for int64 ``positions`` ``[tokens]``."""
    if rope.kind == "dynamic":
        angles = positions[:, None] * _dynamic(rope, dict(rope.options), positions)
        return angles.cos(), angles.sin()
    inverse, amplitude = _frequencies(rope)
    angles = positions[:, None].float() * inverse.to(positions.device)
    return angles.cos() * amplitude, angles.sin() * amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[tokens, heads, head_dim]``; halves of the first ``dim`` entries are pairs."""
    dim = 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    low, high, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def _number(options: dict[str, object], name: str, default: float) -> float:
    value = options.get(name)
    return float(value) if isinstance(value, (int, float)) else default


@functools.lru_cache(maxsize=64)
def _frequencies(rope: Rope) -> tuple[Tensor, float]:
    """Inverse frequencies ``[dim / 2]`` and the factor on cosines and sines."""
    options = dict(rope.options)
    inverse = _plain(rope.theta, rope.dim)
    factor = _number(options, "factor", 1.0)
    if rope.kind == "linear":
        return inverse / factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, options, inverse, factor), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, options, inverse, factor)
    if rope.kind == "longrope":
        return _longrope(rope, options, inverse)
    return inverse, 1.0


def _dynamic(rope: Rope, options: dict[str, object], positions: Tensor) -> Tensor:
    """NTK-scaled inverse frequencies for each position, ``[tokens, dim / 2]``."""
    factor = _number(options, "factor", 1.0)
    length = (positions + 1).clamp(min=rope.original).float()
    stretch = factor * length / rope.original - (factor - 1)
    base = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    exponent = torch.arange(0, rope.dim, 2, device=positions.device).float() / rope.dim
    return 1.0 / base[:, None] ** exponent


def _llama3(rope: Rope, options: dict[str, object], inverse: Tensor, factor: float) -> Tensor:
    low = _number(options, "low_freq_factor", 1.0)
    high = _number(options, "high_freq_factor", 4.0)
    turns = rope.original * inverse / (2 * math.pi)  # rotations over the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inverse / factor + blend * inverse


def _yarn(
    rope: Rope, options: dict[str, object], inverse: Tensor, factor: float
) -> tuple[Tensor, float]:
    def dimension(turns: float) -> float:
        ratio = math.log(rope.original / (turns * 2 * math.pi))
        return rope.dim * ratio / (2 * math.log(rope.theta))

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    low = dimension(_number(options, "beta_fast", 32.0))
    high = dimension(_number(options, "beta_slow", 1.0))
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.dim // 2).float() - low) / (high - low)).clamp(0, 1)
    mixed = inverse / factor * ramp + inverse * (1 - ramp)
    mscale, mscale_all = _number(options, "mscale", 0.0), _number(options, "mscale_all_dim", 0.0)
    default = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1)
    return mixed, _number(options, "attention_factor", default)


def _longrope(rope: Rope, options: dict[str, object], inverse: Tensor) -> tuple[Tensor, float]:
    name = "long_factor" if rope.context > rope.original else "short_factor"
    factors = options[name]
    assert isinstance(factors, tuple)
    stretch = _number(options, "factor", 1.0)
    default = math.sqrt(1 + math.log(stretch) / math.log(rope.original)) if stretch > 1 else 1.0
    return inverse / torch.tensor(factors), _number(options, "attention_factor", default)
