"""The decoder: one forward pass for every architecture, over a flat batch of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quire.models import rope
from quire.models.blocks import MLP, MixtureOfExperts, Normalise
from quire.models.spec import LayerSpec, ModelSpec, Rope
from quire.weights.linear import Linear

Angles = dict[Rope, tuple[Tensor, Tensor]]


class Attend(Protocol):
    """Attention of one layer, given by the engine.

    ``q`` ``[tokens, heads, head_dim]``, ``k`` and ``v`` ``[tokens, kv_heads, head_dim]``, after
    normalisation and rotation. Stores k and v, reads what each token may see under the layer's
    window, applies scale and soft cap, and returns ``[tokens, heads, head_dim]``.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store and attend."""
        ...


@dataclass(frozen=True)
class Layer:
    """The weights of one layer. ``norms`` in the order in which they are applied."""

    spec: LayerSpec
    qkv: Linear
    out: Linear
    q_norm: Normalise | None
    k_norm: Normalise | None
    norms: tuple[Normalise, ...]
    mlp: MLP | MixtureOfExperts


@dataclass(frozen=True)
class Decoder:
    """A loaded model."""

    spec: ModelSpec
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    final_norm: Normalise
    head: Linear

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and KV."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states ``[tokens, hidden]``; ``ids``, ``positions`` int64 ``[tokens]``."""
        x = self.embedding[ids]
        if self.spec.embed_scale is not None:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype, device=x.device)
        ropes = {layer.spec.rope for layer in self.layers} - {None}
        angles = {r: rope.tables(r, positions) for r in ropes if r is not None}
        for index, layer in enumerate(self.layers):
            x = self._layer(index, layer, x, angles, attend)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[rows, hidden]`` -> float32 logits ``[rows, vocab]``."""
        logits = self.head(hidden).float()
        cap = self.spec.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _layer(self, index: int, layer: Layer, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        norms = layer.norms
        match self.spec.placement:
            case "pre":
                x = x + self._attention(index, layer, norms[0](x), angles, attend)
                return x + layer.mlp(norms[1](x))
            case "post":
                x = x + norms[0](self._attention(index, layer, x, angles, attend))
                return x + norms[1](layer.mlp(x))
            case "sandwich":
                x = x + norms[1](self._attention(index, layer, norms[0](x), angles, attend))
                return x + norms[3](layer.mlp(norms[2](x)))
            case "parallel":
                attention = self._attention(index, layer, norms[0](x), angles, attend)
                return x + attention + layer.mlp(norms[1](x))

    def _attention(
        self, index: int, layer: Layer, x: Tensor, angles: Angles, attend: Attend
    ) -> Tensor:
        spec = self.spec
        widths = [h * spec.head_dim for h in (spec.heads, spec.kv_heads, spec.kv_heads)]
        q, k, v = torch.split(layer.qkv(x), widths, dim=-1)  # each [tokens, heads * head_dim]
        if spec.qk_norm == "full" and layer.q_norm and layer.k_norm:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k, v = (t.view(len(t), -1, spec.head_dim) for t in (q, k, v))
        if spec.qk_norm == "head" and layer.q_norm and layer.k_norm:
            q, k = layer.q_norm(q), layer.k_norm(k)
        if layer.spec.rope is not None:
            cos, sin = angles[layer.spec.rope]
            q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        return layer.out(attend(index, q, k, v).flatten(1))
