"""Gemma 3 (text): five sliding layers to one full, each kind with its own rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from quire.models import gemma2
from quire.models.config import Config, layer_types, rope
from quire.models.spec import LayerSpec, ModelSpec

THETAS = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}  # where the config is silent


def spec(config: Config, context: int | None) -> ModelSpec:
    """``Gemma3ForCausalLM``."""
    config = {**THETAS, **config}
    pattern = config.get("sliding_window_pattern", 6)
    count = config["num_hidden_layers"]
    slides = layer_types(config, [bool((index + 1) % pattern) for index in range(count)])
    full = rope(config, context)
    unscaled = {"rope_theta": config["rope_local_base_freq"], "rope_scaling": None}
    local = rope(config | unscaled, context, kind="sliding_attention")
    window = config["sliding_window"]
    layers = tuple(LayerSpec(window, local) if s else LayerSpec(None, full) for s in slides)
    return replace(gemma2.sandwich(config, context, layers), qk_norm="head")
