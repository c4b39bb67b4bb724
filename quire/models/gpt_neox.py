"""GPT-NeoX and Pythia: layer norms, partial rotation, attention and MLP side by side."""

from __future__ import annotations

from quire.models.config import Config, common, rope, uniform_layers
from quire.models.spec import LayerSpec, ModelSpec, Names

NAMES = Names(
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    qkv=("gpt_neox.layers.{i}.attention.query_key_value",),
    out="gpt_neox.layers.{i}.attention.dense",
    up=("gpt_neox.layers.{i}.mlp.dense_h_to_4h",),
    down="gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    norms=(
        "gpt_neox.layers.{i}.input_layernorm",
        "gpt_neox.layers.{i}.post_attention_layernorm",
    ),
)


def spec(config: Config, context: int | None) -> ModelSpec:
    """``GPTNeoXForCausalLM``."""
    config = {
        "rope_theta": config.get("rotary_emb_base", 10000.0),
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
        "attention_bias": True,
        "mlp_bias": True,
        **config,
        "num_key_value_heads": None,
    }
    return ModelSpec(
        **common(config, context, eps="layer_norm_eps"),
        layers=uniform_layers(config, LayerSpec(rope=rope(config, context))),
        names=NAMES,
        norm="layer",
        placement="parallel" if config.get("use_parallel_residual", True) else "pre",
        gated=False,
        interleaved_qkv=True,
    )
