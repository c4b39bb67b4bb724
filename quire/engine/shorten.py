"""Runs prompts through a model's first layers, for a method that chooses their tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quire.attention.composed import partial
from quire.kv.method import Entries, Shorten
from quire.kv.tree import Tokens, common_prefix
from quire.models import rope
from quire.models.decoder import Decoder


@dataclass
class Shortener:
    """The first layers of ``model``, run for ``method``, ``chunk`` tokens a step.

    The KV of the last prompt stays, ``keys`` and ``values`` ``[kv_heads, tokens, head_dim]`` of
    each layer, so that of prompts in lexical order each shared prefix is computed once.
    """

    model: Decoder
    method: Shorten
    chunk: int
    prompt: Tokens = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def places(self, prompt: Tokens) -> NDArray[np.int64] | None:
        """Places of what the method keeps of ``prompt`` int32 ``[tokens]``; None: all."""
        layers = self.method.layers(len(self.model.spec.layers))
        known = common_prefix(prompt[:-1], self.prompt)  # the last token's query is needed
        self.prompt = prompt
        self.keys = [x[:, :known] for x in self.keys]
        self.values = [x[:, :known] for x in self.values]
        last = torch.empty(0)

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None
        ) -> Tensor:
            nonlocal last
            if rotation is not None:
                q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
            last = q[-1].clone()
            for held, new in ((self.keys, k), (self.values, v)):
                if layer == len(held):
                    held.append(new.new_empty(new.shape[1], 0, new.shape[2]))
                held[layer] = torch.cat([held[layer], new.transpose(0, 1)], dim=1)
            return self._attend(layer, q)

        ids = torch.from_numpy(prompt.astype(np.int64))
        with torch.inference_mode():
            for first in range(known, len(ids), self.chunk):
                at = torch.arange(first, min(first + self.chunk, len(ids)))
                self.model.forward(ids[at], at, attend, layers=layers)
            return self.method.shorten(last, self.keys[-1])

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of the newest rows ``q`` ``[rows, heads, head_dim]`` over a layer's KV."""
        spec = self.model.spec
        keys, values = self.keys[layer], self.values[layer]
        size, rows = keys.shape[1], len(q)
        positions = torch.arange(size)
        apart = positions[size - rows :, None] - positions
        visible = (apart >= 0) & (apart < (spec.layers[layer].window or size))
        if spec.softcap is not None:
            entries = Entries(keys, values, positions.expand(len(keys), -1))
            part = partial(
                q, entries, scale=spec.scale, softcap=spec.softcap, visible=visible[:, None]
            )
            return part.out.to(q.dtype)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=visible,
            scale=spec.scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).contiguous()
