"""A model without weights and a tokenizer of bytes: engine tests in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

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
        self, ids: Tensor, positions: Tensor, attend: object, *, layers: int | None = None
    ) -> Tensor:
        self.tokens_seen += len(ids)
        x = self.embedding[ids] + self.places[positions]
        for layer in range(len(self.spec.layers))[:layers]:
            q = torch.stack([x, x.flip(-1)], dim=1)
            k, v = x[:, None].clone(), x.roll(1, -1)[:, None]
            x = x + attend(layer, q, k, v, None).sum(1)  # type: ignore[operator]
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.T


class ByteTokenizer:
    """One token a byte."""

    eos_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")

    def token_text(self, token: int) -> str:
        return bytes([token]).decode(errors="replace")
