"""The native extension: whether it is there, and its kernels as functions of tensors.

Every function here needs contiguous rows of float32 or bfloat16 on the CPU (see `fits`) and checks
shapes before it passes addresses on. What each computes is defined by the plain PyTorch code
beside its caller; tests compare the two for every instruction set.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.errors import InvalidRequestError

PAGE = 16  # tokens of a tile of keys or values
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
_DTYPES = (torch.float32, torch.bfloat16)


def _load() -> tuple[ModuleType | None, str]:
    try:
        from quire.kernels import _native
    except ImportError as error:
        return None, str(error)
    return _native, ""


_extension, missing_because = _load()
best = "plain" if _extension is None else str(_extension.active())
_chosen = best


def available() -> list[str]:
    """What `use` accepts: "plain", then the instruction sets that run here, plainest first."""
    return ["plain", *([] if _extension is None else _extension.available())]


def active() -> str:
    """The kernels in use: an instruction set, or "plain" for PyTorch alone."""
    return _chosen


def use(name: str) -> str:
    """Choose the kernels of the whole process; returns the former choice. Raises ValueError."""
    global _chosen
    if name not in available():
        raise ValueError(f"No kernels for {name!r} here; there are {', '.join(available())}.")
    before = _chosen
    if name != "plain":
        _native().use(name)
    _chosen = name
    return before


def configure(*, plain: bool = False) -> None:
    """Take the best kernels, or those that QUIRE_KERNELS names, and as many threads as PyTorch.

    ``plain``: PyTorch alone. For the whole process. Raises InvalidRequestError.
    """
    asked = "plain" if plain else os.environ.get("QUIRE_KERNELS", best)
    if asked not in available():
        raise InvalidRequestError(
            f"QUIRE_KERNELS is {asked!r}.",
            field="QUIRE_KERNELS",
            value=asked,
            limit=available(),
            action=f"On this machine it can be {', '.join(available())}.",
        )
    use(asked)
    if _extension is not None:
        _extension.set_threads(torch.get_num_threads())


def warn_if_missing() -> None:
    """Say once that the extension was not built and what that costs."""
    if _extension is None:
        warnings.warn(
            "Quire's native kernels are not installed; PyTorch alone runs, several times slower. "
            "Install a C++20 compiler and reinstall quire (quire info tells more).",
            stacklevel=2,
        )


def fits(x: Tensor) -> bool:
    """Whether native kernels can take ``x``: they are in use, on the CPU, float32 or bfloat16."""
    return _chosen != "plain" and x.device.type == "cpu" and x.dtype in _DTYPES


def _native() -> ModuleType:
    assert _extension is not None, missing_because
    return _extension


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """RMS normalisation of each row of ``x`` ``[..., width]``, times ``weight`` (plus one)."""
    width = x.shape[-1]
    assert weight.shape == (width,)
    assert weight.dtype == x.dtype
    rows = x.contiguous()
    out = torch.empty_like(rows)
    _native().rms_norm(
        rows.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        rows.numel() // width,
        width,
        eps,
        1.0 if plus_one else 0.0,
        _is_bf16(x),
    )
    return out


def gate(x: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` for ``x`` ``[rows, 2 * width]`` holding gate, then up."""
    return _activated(x, x.shape[1] // 2, activation, gated=True)


def activate(x: Tensor, activation: str) -> Tensor:
    """``act(x)`` for ``x`` ``[rows, width]``."""
    return _activated(x, x.shape[1], activation, gated=False)


def _activated(x: Tensor, width: int, activation: str, *, gated: bool) -> Tensor:
    assert x.is_contiguous()
    out = x.new_empty(x.shape[0], width)
    kind = ACTIVATIONS.index(activation)
    _native().gate(x.data_ptr(), out.data_ptr(), len(x), width, kind, gated, _is_bf16(x))
    return out


def rotate_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Rotate q and k in place and store k and v in tiles of the arena, in one pass.

    ``q`` ``[tokens, heads, head_dim]``, ``k``, ``v`` ``[tokens, kv_heads, head_dim]``, tokens any
    distance apart; ``rotation``: cosines and sines float32 ``[tokens, rotated / 2]``; ``slots``
    int64 ``[tokens]``; ``keys``, ``values``: one layer of a `TiledArena`.
    """
    tokens, heads, head_dim = q.shape
    for part in (q, k, v):
        assert part.stride(2) == 1
        assert part.stride(1) == head_dim
        assert part.dtype == keys.dtype
    assert slots.shape == (tokens,)
    assert slots.is_contiguous()
    cos, sin = rotation if rotation is not None else (None, None)
    _native().rotate_append(
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        _address(cos),
        _address(sin),
        0 if cos is None else 2 * cos.shape[1],
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        tokens,
        heads,
        k.shape[1],
        head_dim,
        _is_bf16(q),
    )


def attend(
    plan: object,
    layer: int,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of ``q`` ``[tokens, heads, head_dim]`` over a plan's reads of one layer's tiles.

    ``lse`` float32 ``[tokens, heads]`` receives the log of each sum of exp(scores).
    """
    assert q.stride(2) == 1
    assert q.stride(1) == q.shape[2]
    assert q.dtype == keys.dtype
    out = torch.empty(q.shape, dtype=q.dtype)
    _native().attend(
        plan,
        layer,
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        scale,
        softcap or 0.0,
        _address(lse),
        _is_bf16(q),
    )
    return out


def make_plan(*arguments: object) -> object:
    """An attention plan; the arguments are explained in `quire/attention/native.py`."""
    return _native().make_plan(*arguments)


def read_slots(keys: Tensor, values: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[kv_heads, n, head_dim]`` in ``slots`` int64 ``[n]``.

    ``keys``, ``values``: one layer of a `TiledArena`.
    """
    _, kv_heads, steps, _, pack = keys.shape
    assert slots.is_contiguous()
    assert not len(slots) or int(slots.max()) < len(keys) * PAGE
    k, v = keys.new_empty(2, kv_heads, len(slots), steps * pack)
    _native().read_slots(
        keys.data_ptr(),
        values.data_ptr(),
        slots.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        len(slots),
        kv_heads,
        steps * pack,
        _is_bf16(keys),
    )
    return k, v


def choose_chunks(
    q: Tensor,
    means: Tensor,
    skipped: Tensor,
    scale: float,
    count: int,
    run: int,
    places: Tensor,
) -> None:
    """Write the entries of the ``count`` best chunks of ``run`` neighbours, ascending.

    ``q`` ``[rows, heads, head_dim]``; ``means`` of the chunks' keys in tiles, ``[kv_heads,
    chunks / 16, head_dim / p, 16, p]``; ``skipped`` bool ``[kv_heads, chunks]``, of which at least
    ``count`` are False; ``places`` int64 ``[rows, kv_heads, at least count * run]``. A chunk is as
    good as the largest share of a softmax over the chunks that a query head of its KV head gives.
    """
    rows, heads, head_dim = q.shape
    kv_heads, chunks = skipped.shape
    assert q.stride(2) == 1
    assert q.stride(1) == head_dim
    assert q.dtype == means.dtype
    assert 0 < count <= chunks
    assert means.shape[:3] == (kv_heads, -(-chunks // PAGE), head_dim // means.shape[4])
    assert places.shape[:2] == (rows, kv_heads)
    assert places.shape[2] >= count * run
    for tensor in (means, skipped, places):
        assert tensor.is_contiguous()
    _native().choose(
        q.data_ptr(),
        q.stride(0),
        means.data_ptr(),
        skipped.data_ptr(),
        rows,
        kv_heads,
        heads // kv_heads,
        head_dim,
        chunks,
        count,
        run,
        places.data_ptr(),
        places.shape[2],
        scale,
        _is_bf16(q),
    )


def attend_chosen(
    reads: NDArray[np.int64],
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Merge attention over chosen entries of one layer's tiles into ``out`` and ``lse``.

    ``reads`` int64 ``[reads, 8]`` is explained at ``FetchRead`` in kernels.h; the rest as in
    `attend_packed`, which see.
    """
    _check_results(q, out, lse)
    assert q.dtype == keys.dtype
    kv_heads = keys.shape[1]
    _native().attend_chosen(
        reads,
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        lse.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        kv_heads,
        q.shape[1] // kv_heads,
        q.shape[2],
        scale,
        softcap or 0.0,
        _is_bf16(q),
    )


def make_packed_plan(*arguments: object) -> object:
    """A plan over packed entries; the arguments are explained in `quire/attention/packed.py`."""
    return _native().make_packed_plan(*arguments)


def attend_packed(
    plan: object,
    layer: int,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Merge attention of ``q`` ``[tokens, heads, head_dim]`` over a plan's packed entries into it.

    ``out`` float32 ``[tokens, heads, head_dim]`` holds normalised results, ``lse`` float32
    ``[tokens, heads]`` the logs of their weights' sums.
    """
    _check_results(q, out, lse)
    _native().attend_packed(
        plan,
        layer,
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        lse.data_ptr(),
        scale,
        softcap or 0.0,
        _is_bf16(q),
    )


def _check_results(q: Tensor, out: Tensor, lse: Tensor) -> None:
    assert q.stride(2) == 1
    assert q.stride(1) == q.shape[2]
    for result in (out, lse):
        assert result.dtype == torch.float32
        assert result.is_contiguous()
    assert out.shape == q.shape
    assert lse.shape == q.shape[:2]


def dense(x: Tensor, weight: Tensor, outs: int, bias: Tensor | None, add: Tensor | None) -> Tensor:
    """``x W^T + bias + add`` for ``weight`` packed by `tiles`; ``x`` ``[rows, in]``."""
    out = x.new_empty(x.shape[0], outs)
    _native().dense(*_product(x, out, bias, add), weight.data_ptr())
    return out


def int8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    sums: Tensor,
    outs: int,
    bias: Tensor | None,
    add: Tensor | None,
) -> Tensor:
    """The same for int8 tiles; each row of ``x`` is rounded to int8 on the way."""
    out = x.new_empty(x.shape[0], outs)
    _native().int8(
        *_product(x, out, bias, add), weight.data_ptr(), scales.data_ptr(), sums.data_ptr()
    )
    return out


def grouped(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bits: int,
    group: int,
    outs: int,
    bias: Tensor | None,
    add: Tensor | None,
    *,
    few: bool = True,
) -> Tensor:
    """The same for grouped codes; ``few`` lets up to 8 rows take the path made for them."""
    out = x.new_empty(x.shape[0], outs)
    _native().grouped(
        *_product(x, out, bias, add),
        weight.data_ptr(),
        scales.data_ptr(),
        _address(offsets),
        bits,
        group,
        few,
    )
    return out


def _product(
    x: Tensor, out: Tensor, bias: Tensor | None, add: Tensor | None
) -> tuple[int, int, int, int, int, int, int, int, bool]:
    rows, ins = x.shape
    outs = out.shape[1]
    assert x.stride(1) == 1
    assert x.stride(0) % 4 == 0
    assert x.data_ptr() % 4 == 0
    assert bias is None or (bias.shape == (outs,) and bias.dtype == x.dtype)
    assert add is None or (add.shape == out.shape and add.dtype == x.dtype and add.is_contiguous())
    return (
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        _address(bias),
        _address(add),
        rows,
        ins,
        outs,
        _is_bf16(x),
    )


@dataclass(frozen=True)
class Weights:
    """What `dense`, `int8` or `grouped` (``kind``) multiplies with: arguments of theirs."""

    kind: Literal["dense", "int8", "grouped"]
    weight: Tensor
    ins: int
    outs: int
    scales: Tensor | None = None
    offsets: Tensor | None = None
    sums: Tensor | None = None
    bits: int = 0
    group: int = 0
    few: bool = False

    def numbers(self, bias: Tensor | None) -> list[int]:
        """As ``linear`` in module.cpp reads them."""
        return [
            ("dense", "int8", "grouped").index(self.kind),
            self.weight.data_ptr(),
            _address(self.scales),
            _address(self.offsets),
            _address(self.sums),
            _address(bias),
            self.ins,
            self.outs,
            self.bits,
            self.group,
            self.few,
        ]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights: a pre-normalised decoder layer with a dense MLP.

    ``rotation``, ``plan``: which of those that `run_layers` is given; -1: not rotated.
    ``products``: of q, k and v, of attention's result, into the MLP and out of it; with biases.
    """

    norm: Tensor  # [hidden]
    mlp_norm: Tensor  # [hidden]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    rotation: int
    plan: int
    products: tuple[tuple[Weights, Tensor | None], ...]

    def numbers(self) -> list[int]:
        """As ``make_model`` in module.cpp reads them."""
        norms = map(_address, (self.norm, self.mlp_norm, self.q_norm, self.k_norm))
        products = (n for weights, bias in self.products for n in weights.numbers(bias))
        return [*norms, self.rotation, self.plan, *products]


def make_model(
    layers: Sequence[LayerWeights],
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    activation: str,
    gated: bool,
    eps: float,
    plus_one: bool,
    scale: float,
    softcap: float | None,
) -> object:
    """What `run_layers` runs. It points to the tensors of ``layers`` and does not keep them."""
    return _native().make_model(
        np.array([layer.numbers() for layer in layers], dtype=np.int64),
        heads,
        kv_heads,
        head_dim,
        ACTIVATIONS.index(activation),
        gated,
        eps,
        1.0 if plus_one else 0.0,
        scale,
        softcap or 0.0,
        _is_bf16(layers[0].norm),
    )


def run_layers(
    model: object,
    x: Tensor,
    rotations: Sequence[tuple[Tensor, Tensor]],
    plans: Sequence[object],
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Turn the first layer's input ``x`` ``[rows, hidden]`` into the last one's output, in place.

    The other arguments are those of `rotate_append` and `attend`; ``keys`` and ``values`` are of
    all layers.
    """
    assert x.is_contiguous()
    assert slots.shape == (len(x),)
    assert slots.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert x.dtype == keys.dtype == values.dtype
    for pair in rotations:
        for part in pair:
            assert part.is_contiguous()
            assert part.dtype == torch.float32
            assert len(part) == len(x)
    table = [(cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[1]) for cos, sin in rotations]
    _native().run_layers(
        model,
        x.data_ptr(),
        len(x),
        np.array(table, dtype=np.int64).reshape(-1, 3),
        list(plans),
        slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys[0].nbytes,
    )


def tiles(weight: Tensor, pack: int) -> Tensor:
    """``[outs, ins]`` as ``[outs / 16, ins / pack, 16, pack]``, outs padded with zeros."""
    outs, ins = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -outs % 16))
    return padded.view(-1, 16, ins // pack, pack).transpose(1, 2).contiguous()


def widen(x: Tensor) -> Tensor:
    """``x`` in float32."""
    if x.dtype == torch.float32:
        return x
    assert x.is_contiguous()
    out = torch.empty(x.shape, dtype=torch.float32)
    _native().widen(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def argmax(logits: Tensor) -> Tensor:
    """The first largest of each row of float32 ``[rows, vocab]``: int64 ``[rows]``."""
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    chosen = torch.empty(logits.shape[0], dtype=torch.int64)
    _native().argmax(logits.data_ptr(), *logits.shape, chosen.data_ptr())
    return chosen


def sample(
    logits: Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
    draws: Tensor,
) -> Tensor:
    """One token a row of float32 ``[rows, vocab]``; see `quire/decode/sampling.py`."""
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    options = [torch.tensor(v, dtype=torch.float32) for v in (temperature, top_p, min_p)]
    ranks = torch.tensor(top_k, dtype=torch.int64)
    chosen = torch.empty(logits.shape[0], dtype=torch.int64)
    _native().sample(
        logits.data_ptr(),
        *logits.shape,
        *(option.data_ptr() for option in options),
        ranks.data_ptr(),
        draws.data_ptr(),
        chosen.data_ptr(),
    )
    return chosen


def mask(logits: Tensor, rows: Sequence[int], masks: NDArray[np.int32]) -> None:
    """Set logits to -inf where a row's bit is 0; see `quire/decode/sampling.py`.

    ``logits`` float32 ``[.., vocab]``; ``rows`` distinct; ``masks`` ``[rows, words]``, the lowest
    bit of a word first, with a bit for every column at least.
    """
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    assert masks.flags.c_contiguous
    assert masks.shape[0] == len(rows)
    assert masks.shape[1] * 32 >= logits.shape[1]
    at = torch.tensor(rows, dtype=torch.int64)
    _native().mask(
        logits.data_ptr(), logits.shape[1], at.data_ptr(), masks.ctypes.data, *masks.shape
    )
