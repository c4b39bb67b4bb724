"""Gemma 3 (text): five sliding layers to one full, each kind with its own rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from quire.models import gemma2
from quire.models.config import Config, layer_types, rope
from quire.models.spec import LayerSpec, ModelSpec


def spec(config: Config, context: int | None) -> ModelSpec:
    """``Gemma3ForCausalLM``."""
    pattern = config.get("sliding_window_pattern", 6)
    count = config["num_hidden_layers"]
    slides = layer_types(config, [bool((index + 1) % pattern) for index in range(count)])
    full = rope(config, context, kind="full_attention")
    local = rope(config, context, kind="sliding_attention")
    if "rope_parameters" not in config:
        local = replace(local, theta=float(config["rope_local_base_freq"]), kind="default")
    window = config["sliding_window"]
    layers = tuple(LayerSpec(window, local) if s else LayerSpec(None, full) for s in slides)
    return replace(gemma2.spec(config, context), layers=layers, qk_norm="head")
