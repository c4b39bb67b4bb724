"""The decoder: one forward pass for every architecture, over a flat batch of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quire.kernels import native
from quire.kernels.layers import widen
from quire.models import rope
from quire.models.blocks import MLP, MixtureOfExperts, Normalise
from quire.models.spec import LayerSpec, ModelSpec, Rope
from quire.weights.dense import DenseProduct
from quire.weights.linear import Linear, Product

Angles = dict[Rope, tuple[Tensor, Tensor]]


class Attend(Protocol):
    """Attention of one layer, given by the engine.

    ``q`` ``[tokens, heads, head_dim]``, ``k`` and ``v`` ``[tokens, kv_heads, head_dim]``, views of
    one matrix, which it may overwrite. Rotates q and k by ``rotation`` (cosines and sines float32
    ``[tokens, rotated / 2]``; None: not at all), stores k and v, reads what each token may see
    under the layer's window, applies scale and soft cap, and returns ``[tokens, heads, head_dim]``,
    in the last layer those of the rows that the pass wants.
    """

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Rotate, store and attend."""
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

    def products(self) -> list[Product]:
        """All its matrices."""
        mlps = self.mlp.experts if isinstance(self.mlp, MixtureOfExperts) else (self.mlp,)
        found = [self.qkv.product, self.out.product]
        found += [linear.product for mlp in mlps for linear in (mlp.up, mlp.down)]
        return found


@dataclass(frozen=True)
class Decoder:
    """A loaded model."""

    spec: ModelSpec
    embedding: DenseProduct  # [vocab, hidden]
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
        return self.embedding.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices; norms and biases are not worth counting."""
        products = {id(p): p.nbytes for layer in self.layers for p in layer.products()}
        products |= {id(p): p.nbytes for p in (self.embedding, self.head.product)}
        return sum(products.values())

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        layers: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states ``[tokens, hidden]``; ``ids``, ``positions`` int64 ``[tokens]``.

        ``layers``: run only the first so many. ``rows`` int64: of only these tokens; the last layer
        then does no more for the others than their keys and values, which later tokens read.
        """

        def one_by_one(x: Tensor, angles: Angles) -> Tensor:
            run = self.layers[:layers]
            for index, layer in enumerate(run):
                wanted = rows if index == len(run) - 1 else None
                x = self._layer(index, layer, x, angles, attend, wanted)
            return x

        return self.around(ids, positions, one_by_one)

    def around(
        self, ids: Tensor, positions: Tensor, layers: Callable[[Tensor, Angles], Tensor]
    ) -> Tensor:
        """The same for ``layers``, which takes embeddings ``[tokens, hidden]`` through all layers.

        It is given cosines and sines of the positions for each kind of rotation, and may overwrite
        the embeddings.
        """
        x = self.embedding.rows(ids)
        if self.spec.embed_scale is not None:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype, device=x.device)
        ropes = {layer.spec.rope for layer in self.layers} - {None}
        angles = {r: rope.tables(r, positions) for r in ropes if r is not None}
        return self.final_norm(layers(x, angles))

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``[rows, hidden]`` -> float32 logits ``[rows, vocab]``."""
        logits = self.head(hidden)
        logits = widen(logits) if native.fits(logits) else logits.float()
        cap = self.spec.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _layer(
        self,
        index: int,
        layer: Layer,
        x: Tensor,
        angles: Angles,
        attend: Attend,
        rows: Tensor | None,
    ) -> Tensor:
        def attention(all_rows: Tensor, add: Tensor | None = None) -> Tensor:
            return self._attention(index, layer, all_rows, add, angles, attend)

        norms = layer.norms
        whole = x
        if rows is not None:
            x = x[rows]
        match self.spec.placement:
            case "pre":
                x = attention(norms[0](whole), add=x)
                return layer.mlp(norms[1](x), add=x)
            case "post":
                x = x + norms[0](attention(whole))
                return x + norms[1](layer.mlp(x))
            case "sandwich":
                x = x + norms[1](attention(norms[0](whole)))
                return x + norms[3](layer.mlp(norms[2](x)))
            case "parallel":
                return layer.mlp(norms[1](x), add=attention(norms[0](whole), add=x))

    def _attention(
        self,
        index: int,
        layer: Layer,
        x: Tensor,
        add: Tensor | None,
        angles: Angles,
        attend: Attend,
    ) -> Tensor:
        spec = self.spec
        widths = [h * spec.head_dim for h in (spec.heads, spec.kv_heads, spec.kv_heads)]
        q, k, v = torch.split(layer.qkv(x), widths, dim=-1)  # each [tokens, heads * head_dim]
        if spec.qk_norm == "full" and layer.q_norm and layer.k_norm:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k, v = (t.view(len(t), -1, spec.head_dim) for t in (q, k, v))
        if spec.qk_norm == "head" and layer.q_norm and layer.k_norm:
            q, k = layer.q_norm(q), layer.k_norm(k)
        rotation = angles[layer.spec.rope] if layer.spec.rope is not None else None
        return layer.out(attend(index, q, k, v, rotation).flatten(1), add)
