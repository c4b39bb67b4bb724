"""A model without weights, the facts of one, and a tokenizer of bytes: tests in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.kv.method import Calibration, Facts
from quire.models import rope
from quire.models.spec import LayerSpec, ModelSpec, Rope

BYTES = 256


def spec(layers: int = 2, window: int | None = None, context: int = 512) -> ModelSpec:
    layer = LayerSpec(window, Rope(10000.0, 8, "default"))
    return ModelSpec(
        architecture="Mock",
        vocab_size=BYTES,
        hidden_size=8,
        intermediate_size=8,
        heads=2,
        kv_heads=1,
        head_dim=8,
        layers=(layer,) * layers,
        context=context,
        scale=0.3,
        norm_eps=1e-6,
        activation="silu",
        tied=True,
    )


@dataclass
class MockModel:
    """Attention over random embeddings: every token depends on all before it, in order."""

    spec: ModelSpec = field(default_factory=spec)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens_seen: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.embedding = torch.randn(BYTES, 8, generator=generator)
        self.places = torch.randn(self.spec.context, 8, generator=generator)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Callable[..., Tensor],
        *,
        layers: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        self.tokens_seen += len(ids)
        x = self.embedding[ids] + self.places[positions]
        run = range(len(self.spec.layers))[:layers]
        for layer in run:
            q, k, v = self.project(x)
            if rows is not None and layer == run[-1]:
                x = x[rows]
            x = x + attend(layer, q, k, v, None).sum(1)
        return x

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` ``[tokens, 8]`` -> queries, keys and values, ``[tokens, heads, 8]`` each."""
        return torch.stack([x, x.flip(-1)], dim=1), x[:, None].clone(), x.roll(1, -1)[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.T


def make_facts(
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    *,
    windows: tuple[int | None, ...] | None = None,
    calibrate: Callable[[], Calibration] = lambda: Calibration([], [], []),
    softcap: float | None = None,
) -> Facts:
    """What KV methods are told of a model with one RoPE for all layers."""

    def turn(_layer: int, x: Tensor, positions: Tensor, back: bool) -> Tensor:
        at = positions.expand(x.shape[:-1]).flatten()
        cos, sin = rope.tables(Rope(10000.0, head_dim, "default"), at)
        flat = x.reshape(len(at), 1, head_dim).float()
        return rope.rotate(flat, cos, -sin if back else sin).view(x.shape).to(x.dtype)

    return Facts(
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        scale=head_dim**-0.5,
        windows=windows or (None,) * layers,
        turn=turn,
        calibrate=calibrate,
        softcap=softcap,
    )


class ByteTokenizer:
    """One token a byte."""

    eos_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")

    def token_text(self, token: int) -> str:
        return bytes([token]).decode(errors="replace")
