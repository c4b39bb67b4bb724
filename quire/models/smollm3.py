"""SmolLM3: Llama in which every fourth layer has no position encoding."""

from __future__ import annotations

from dataclasses import replace

from quire.models import qwen2
from quire.models.config import Config, common
from quire.models.spec import ModelSpec


def spec(config: Config, context: int | None) -> ModelSpec:
    """``SmolLM3ForCausalLM``."""
    every = config.get("no_rope_layer_interval", 4)
    count = config["num_hidden_layers"]
    turns = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(count)]
    layers = qwen2.layers(config, context)
    layers = tuple(
        layer if turn else replace(layer, rope=None)
        for layer, turn in zip(layers, turns, strict=True)
    )
    return ModelSpec(**common(config, context, tied=True), layers=layers)
