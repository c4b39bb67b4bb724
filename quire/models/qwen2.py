"""Qwen 2 and 2.5: Llama with biases on q, k, v; upper layers may slide."""

from __future__ import annotations

from quire.models.config import Config, common, windowed_layers
from quire.models.spec import LayerSpec, ModelSpec


def layers(config: Config, context: int | None) -> tuple[LayerSpec, ...]:
    """Layers from ``max_window_layers`` on slide, if ``use_sliding_window``."""
    first = config.get("max_window_layers", 28)
    on = bool(config.get("use_sliding_window"))
    slides = [on and index >= first for index in range(config["num_hidden_layers"])]
    return windowed_layers(config, context, slides)


def spec(config: Config, context: int | None) -> ModelSpec:
    """``Qwen2ForCausalLM``."""
    shared = common(config, context) | {"qkv_bias": True, "out_bias": False}
    return ModelSpec(**shared, layers=layers(config, context))
