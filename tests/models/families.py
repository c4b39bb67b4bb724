"""Small random models of every architecture, made by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

BASE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}


def rope(kind: str, **options: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LONG = rope(
    "longrope",
    short_factor=[1.0 + 0.1 * i for i in range(4)],
    long_factor=[2.0 + 0.3 * i for i in range(4)],
    original_max_position_embeddings=128,
)
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biased": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama3": ("Llama", LLAMA3),
    "llama-linear": ("Llama", rope("linear", factor=4.0)),
    "llama-dynamic": ("Llama", rope("dynamic", factor=4.0)),
    "llama-yarn": (
        "Llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn-scaled": (
        "Llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            mscale=1.0,
            mscale_all_dim=0.5,
            beta_fast=16,
            beta_slow=2,
            truncate=False,
        ),
    ),
    "llama-yarn-attention": (
        "Llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3),
    ),
    "mistral": ("Mistral", {"sliding_window": 11}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biased": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
    ),
    "gemma2-untied": (
        "Gemma2",
        {
            "head_dim": 16,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 24},
    ),
    "gemma3-linear": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-window": ("Phi3", {"sliding_window": 7}),
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 128, **LONG}),
    "phi4-partial": ("Phi3", {"partial_rotary_factor": 0.75, "head_dim": 16}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3-window": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "pythia": ("GPTNeoX", {"rotary_pct": 0.5, "hidden_act": "gelu"}),
    "pythia-serial": ("GPTNeoX", {"use_parallel_residual": False, "hidden_act": "gelu"}),
    "pythia-unbiased": (
        "GPTNeoX",
        {"attention_bias": False, "hidden_act": "gelu_new", "tie_word_embeddings": True},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 5, "norm_topk_prob": True, **MOE}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {"num_experts": 4, "mlp_only_layers": [0], "norm_topk_prob": False, **MOE},
    ),
    "qwen3-moe-sparse": (
        "Qwen3Moe",
        {"num_experts": 4, "decoder_sparse_step": 2, "num_hidden_layers": 4, **MOE},
    ),
    "qwen3-moe-window": (
        "Qwen3Moe",
        {"num_experts": 4, "use_sliding_window": True, "sliding_window": 9, **MOE},
    ),
}


def make(name: str, folder: Path) -> torch.nn.Module:
    """A random model of transformers, saved to ``folder``."""
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**BASE, **changes})
    torch.manual_seed(len(name))
    kind = "Gemma3" if family == "Gemma3Text" else family
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            weight.normal_(0.5 * centre, 0.15)
    model.save_pretrained(folder)
    return model
