"""Runs a prompt through a model's first layers, for a method that chooses its tokens."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quire.kv.method import Shorten
from quire.kv.tree import Tokens
from quire.models import rope
from quire.models.decoder import Decoder


def shorten(
    model: Decoder, method: Shorten, prompt: Tokens, chunk: int
) -> NDArray[np.int64] | None:
    """Places of the tokens that ``method`` keeps of ``prompt`` int32 ``[tokens]``; None: all.

    Nothing is kept of this pass: its KV lives in temporary tensors, ``chunk`` tokens a step.
    """
    spec = model.spec
    keys: list[Tensor] = []  # of each layer [kv_heads, tokens, head_dim]
    values: list[Tensor] = []
    last = torch.empty(0)

    def attend(
        layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        nonlocal last
        if rotation is not None:
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        last = q[-1].clone()
        for stack, new in ((keys, k), (values, v)):
            part = new.transpose(0, 1)
            if layer == len(stack):
                stack.append(part.clone())
            else:
                stack[layer] = torch.cat([stack[layer], part], dim=1)
        size, rows = keys[layer].shape[1], len(q)
        apart = torch.arange(size - rows, size)[:, None] - torch.arange(size)
        visible = (apart >= 0) & (apart < (spec.layers[layer].window or size))
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[layer][None],
            values[layer][None],
            attn_mask=visible,
            scale=spec.scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).contiguous()

    ids = torch.from_numpy(prompt.astype(np.int64))
    with torch.inference_mode():
        for first in range(0, len(ids), chunk):
            part = ids[first : first + chunk]
            at = torch.arange(first, first + len(part))
            model.forward(part, at, attend, layers=method.layers)
        return method.shorten(last, keys[-1])
