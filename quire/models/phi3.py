"""Phi-3 and Phi-4: q, k, v and gate, up are stored fused; long contexts through longrope."""

from __future__ import annotations

from quire.models.config import Config, common, windowed_layers
from quire.models.spec import ModelSpec, Names

NAMES = Names(
    qkv=("model.layers.{i}.self_attn.qkv_proj",),
    up=("model.layers.{i}.mlp.gate_up_proj",),
)


def spec(config: Config, context: int | None) -> ModelSpec:
    """``Phi3ForCausalLM``."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type") in ("su", "yarn"):  # what early checkpoints call longrope
        config = config | {"rope_scaling": scaling | {"type": "longrope"}}
    slides = [True] * config["num_hidden_layers"]
    layers = windowed_layers(config, context, slides)
    return ModelSpec(**common(config, context), layers=layers, names=NAMES)
