"""Random checkpoints of well-known shapes, for measuring speed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-shaped model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = 32000
    tied: bool = True
    context: int = 16384

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, vocab=512),
    "135m": Shape(576, 30, 9, 3, 1536),
    "1.1b": Shape(2048, 22, 32, 4, 5632, tied=False),
}


def make_checkpoint(name: str, folder: Path) -> Path:
    """Write a random bfloat16 checkpoint of ``SHAPES[name]`` below ``folder``, once."""
    shape = SHAPES[name]
    target = folder / name
    if (target / "model.safetensors").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    weights = {
        "model.embed_tokens.weight": matrix(shape.vocab, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    if not shape.tied:
        weights["lm_head.weight"] = matrix(shape.vocab, hidden)
    for index in range(shape.layers):
        at = f"model.layers.{index}"
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (shape.intermediate, hidden),
            "mlp.up_proj": (shape.intermediate, hidden),
            "mlp.down_proj": (hidden, shape.intermediate),
        }
        weights |= {f"{at}.{k}.weight": matrix(*size) for k, size in sizes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    partial = target / "partial.tmp"
    save_file(weights, str(partial), metadata={"format": "pt"})
    partial.rename(target / "model.safetensors")
    return target
