"""Attention without pages, segments or kernels: a list of keys and values for each request."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.models.decoder import Decoder
from quire.models.rope import rotate
from quire.models.spec import ModelSpec


@dataclass
class PlainAttend:
    """An `Attend` for a flat batch; ``owner`` ``[tokens]`` says whose each token is."""

    spec: ModelSpec
    owner: Tensor
    kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        out = torch.empty_like(q)
        for request in self.owner.unique().tolist():
            mine = self.owner == request
            keys, values = k[mine], v[mine]
            if (layer, request) in self.kept:
                old_keys, old_values = self.kept[layer, request]
                keys, values = torch.cat((old_keys, keys)), torch.cat((old_values, values))
            self.kept[layer, request] = keys, values
            out[mine] = self._read(layer, q[mine], keys, values)
        return out

    def _read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` ``[new, heads, dim]`` are the last of ``k`` ``[all, kv_heads, dim]``."""
        group = self.spec.heads // self.spec.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.spec.scale
        if self.spec.softcap is not None:
            scores = self.spec.softcap * torch.tanh(scores / self.spec.softcap)
        at = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))  # [new, all]
        visible = at >= 0
        window = self.spec.layers[layer].window
        if window is not None:
            visible &= at < window
        scores = scores.masked_fill(~visible, float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.float().softmax(-1).to(v.dtype), v)


@torch.no_grad()
def logits_in_steps(model: Decoder, prompts: list[Tensor], steps: list[int]) -> list[Tensor]:
    """Logits ``[length, vocab]`` of each prompt, which grows by at most ``steps[i]`` at step i."""
    attend = PlainAttend(model.spec, torch.empty(0))
    rows: list[list[Tensor]] = [[] for _ in prompts]
    start = 0
    for step in steps:
        parts = [prompt[start : start + step] for prompt in prompts]
        sizes = [len(part) for part in parts]
        attend.owner = torch.arange(len(prompts)).repeat_interleave(torch.tensor(sizes))
        positions = torch.cat([torch.arange(start, start + size) for size in sizes])
        hidden = model.forward(torch.cat(parts), positions, attend)
        for row, part in zip(rows, model.logits(hidden).split(sizes), strict=True):
            row.append(part)
        start += step
    return [torch.cat(row) for row in rows]
