"""The meaning of attention over segments, in plain PyTorch, one request at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.attention.segments import Item
from quire.kv.arena import Arena, TiledArena


def attend(
    arena: Arena | TiledArena,
    layer: int,
    q: Tensor,
    items: list[Item],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of every row over all the KV on its path, in float32.

    ``q`` ``[tokens, heads, head_dim]``, rows in the order of ``items``; the rows' own keys and
    values are already in the arena. Returns ``[tokens, heads, head_dim]`` in q's dtype.
    """
    kv_heads = arena.kv_heads
    outputs = []
    row = 0
    for item in items:
        rows = q[row : row + item.count].float()  # [count, heads, head_dim]
        group = rows.shape[1] // kv_heads
        row += item.count
        at = torch.arange(item.start, item.start + item.count, device=q.device)[:, None]
        parts = [*item.before, (item.segment, item.start + item.count - item.segment.length)]
        heads = []
        for kv_head in range(kv_heads):
            keys, values, positions = [], [], []
            for segment, first in parts:
                count = segment.entries
                if segment.kept is not None:
                    count = min(count, int(segment.kept[layer, kv_head]))
                slots = torch.from_numpy(segment.slots[:count]).to(q.device)
                k, v = arena.read(layer, slots)  # [kv_heads, count, head_dim]
                keys.append(k[kv_head].float())
                values.append(v[kv_head].float())
                start = first + segment.length - segment.entries
                positions.append(torch.arange(start, start + count, device=q.device))
            key_at = torch.cat(positions)[None, :]
            visible = key_at <= at
            if window is not None:
                visible &= at - key_at < window
            mine = rows[:, kv_head * group : (kv_head + 1) * group]  # [count, group, head_dim]
            scores = torch.einsum("tgd,kd->gtk", mine, torch.cat(keys)) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            heads.append(torch.einsum("gtk,kd->tgd", weights, torch.cat(values)))
        outputs.append(torch.cat(heads, dim=1))
    return torch.cat(outputs).to(q.dtype) if outputs else torch.empty_like(q)
