"""Attention over a step's `Layout` with PyTorch operators: dense products and one merge.

Each span gives a partial output and the log-sum-exp of its scores; partial results are merged by
``o = sum_i exp(l_i - l) o_i`` with ``l = logsumexp_i l_i`` (arXiv 2412.03594, section on prefix
attention; the same identity as in FlashDecoding). Runs on CPU and CUDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.attention.segments import Gather, Layout, Span
from quire.kv.arena import Arena

SCORE_BYTES = 32 << 20  # workspace for one tile of float32 scores


@dataclass(frozen=True)
class Tables:
    """A `Layout` with its index arrays as tensors on the arena's device."""

    layout: Layout
    positions: Tensor  # [tokens]
    gathers: tuple[tuple[Tensor, Tensor, Tensor], ...]  # rows [n], slots [n * longest], bias

    @classmethod
    def make(cls, layout: Layout, device: torch.device, dtype: torch.dtype) -> Tables:
        """Copy the index arrays; the bias ``[n, 1, 1, longest]`` is -inf at the padding."""
        return cls(
            layout,
            torch.from_numpy(layout.positions).to(device),
            tuple(_gather_tables(g, device, dtype) for g in layout.gathers),
        )


def _gather_tables(
    gather: Gather, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    slots = torch.from_numpy(gather.slots).to(device)
    lengths = torch.from_numpy(gather.lengths).to(device)
    padding = torch.arange(slots.shape[1], device=device) >= lengths[:, None]
    bias = torch.zeros(padding.shape, dtype=dtype, device=device).masked_fill_(padding, -math.inf)
    return torch.from_numpy(gather.rows).to(device), slots.flatten(), bias[:, None, None, :]


def attend(
    arena: Arena,
    layer: int,
    q: Tensor,
    tables: Tables,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every row over all the KV on its path; see `reference.attend`.

    ``q`` ``[tokens, heads, head_dim]`` -> the same shape and dtype.
    """
    layout = tables.layout
    tokens, heads, head_dim = q.shape
    if not tokens:
        return q
    keys, values = arena.keys[layer], arena.values[layer]  # [kv_heads, slots, head_dim]
    kv_heads = keys.shape[0]
    # Head-major rows: a span's queries for one KV head are then one contiguous matrix.
    qh = q.view(tokens, kv_heads, -1, head_dim).transpose(0, 1).contiguous()  # [kv, t, group, d]
    shape = (layout.levels, kv_heads, tokens, heads // kv_heads)
    outputs = q.new_zeros((*shape, head_dim))
    sums = torch.full(shape, -math.inf, dtype=torch.float32, device=q.device)
    for rows, slots, bias in tables.gathers:
        k = keys.index_select(1, slots).view(kv_heads, len(rows), -1, head_dim).transpose(0, 1)
        v = values.index_select(1, slots).view(kv_heads, len(rows), -1, head_dim).transpose(0, 1)
        part, lse = _partial(qh[:, rows].transpose(0, 1), k, v, scale, softcap, bias)
        outputs[0].index_copy_(1, rows, part.transpose(0, 1))
        sums[0].index_copy_(1, rows, lse.transpose(0, 1))
    for span in layout.spans:
        rows_ = slice(span.row, span.row + span.rows)
        keys_ = slice(span.slot, span.slot + span.keys)
        part, lse = _span(
            span, layer, qh[:, rows_], keys[:, keys_], values[:, keys_], tables, scale, softcap
        )
        outputs[span.level, :, rows_] = part
        sums[span.level, :, rows_] = lse
    if layout.levels == 1:
        merged = outputs[0]
    else:
        weights = sums.softmax(0).to(q.dtype)  # exp(l_i - logsumexp l)
        merged = torch.einsum("nktg,nktgd->ktgd", weights, outputs)
    return merged.transpose(0, 1).reshape(tokens, heads, head_dim)


def _span(
    span: Span,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """One span: ``q`` ``[kv_heads, rows, group, d]``, ``k``, ``v`` ``[kv_heads, keys, d]``.

    Returns the partial output, shaped as ``q``, and log-sum-exp ``[kv_heads, rows, group]``.
    """
    kv_heads, rows, group, head_dim = q.shape
    if span.causal and not span.masked and softcap is None and _has_flash(q):
        spread = (kv_heads, group, span.keys, head_dim)
        part, lse = _flash(
            q.transpose(1, 2), k[:, None].expand(spread), v[:, None].expand(spread), scale, True
        )
        return part.transpose(1, 2), lse.transpose(1, 2)
    if not span.causal and not span.masked:
        part, lse = _partial(
            q.reshape(1, kv_heads, rows * group, head_dim), k[None], v[None], scale, softcap, None
        )
        return part.view(q.shape), lse.view(q.shape[:3])
    return _masked_span(span, layer, q, k, v, tables, scale, softcap)


def _masked_span(
    span: Span,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """A span in which some rows do not see some keys, tile by tile of rows."""
    kv_heads, rows, group, head_dim = q.shape
    at = tables.positions[span.row : span.row + rows, None]  # [rows, 1]
    key_at = torch.arange(span.position, span.position + span.keys, device=q.device)[None]
    visible = key_at <= at if span.causal else torch.ones_like(key_at <= at)
    if tables.layout.window is not None:
        visible = visible & (at - key_at < tables.layout.window)
    visible = visible[None, :, None]  # [1, rows, 1, keys]
    if span.kept is not None:
        index = torch.arange(span.keys, device=q.device)
        kept = torch.from_numpy(span.kept[layer]).to(q.device)
        visible = visible & (index < kept[:, None])[:, None, None]
    bias = torch.zeros(visible.shape, device=q.device).masked_fill_(~visible, -math.inf)
    bias = bias.expand(bias.shape[0], rows, group, span.keys).flatten(1, 2)
    part, lse = _products(
        q.reshape(1, kv_heads, rows * group, head_dim), k[None], v[None], scale, softcap, bias
    )
    return part.view(q.shape), lse.view(q.shape[:3])


def _has_flash(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused CPU attention, which also returns the log-sum-exp."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out, lse


def _partial(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``q`` ``[n, kv_heads, rows, d]`` over ``k``, ``v`` ``[n, kv_heads, keys, d]``."""
    if softcap is None and _has_flash(q):
        return _flash(q, k, v, scale, bias=bias)
    return _products(q, k, v, scale, softcap, bias)


def _products(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by matrix products in float32, tile by tile of rows to bound the workspace."""
    count, kv_heads, rows, _ = q.shape
    keys = k.shape[2]
    out = torch.empty_like(q)
    lse = torch.empty((count, kv_heads, rows), dtype=torch.float32, device=q.device)
    kt, v = k.float().transpose(-1, -2), v.float()
    tile = max(1, SCORE_BYTES // (4 * count * kv_heads * keys))
    for start in range(0, rows, tile):
        part = slice(start, start + tile)
        scores = (q[:, :, part].float() @ kt) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + (bias if bias.shape[-2] == 1 else bias[..., part, :])
        lse[:, :, part] = scores.logsumexp(-1)
        # A row that sees no key has lse -inf; it gets zeros, and no weight in the merge.
        shift = lse[:, :, part, None].clamp(min=-1e30)
        out[:, :, part] = ((scores - shift).exp() @ v).to(q.dtype)
    return out, lse
