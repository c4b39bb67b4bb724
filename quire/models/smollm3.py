"""SmolLM3: Llama in which every fourth layer has no position encoding, and may slide."""

from __future__ import annotations

from dataclasses import replace

from quire.models.config import Config, common, windowed_layers
from quire.models.spec import ModelSpec


def spec(config: Config, context: int | None) -> ModelSpec:
    """``SmolLM3ForCausalLM``."""
    config = {"rope_theta": 2e6, **config}
    every = config.get("no_rope_layer_interval", 4)
    count = config["num_hidden_layers"]
    turns = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(count)]
    slides = [bool(config.get("use_sliding_window")) and not turn for turn in turns]
    layers = windowed_layers(config, context, slides)
    layers = tuple(
        layer if turn else replace(layer, rope=None)
        for layer, turn in zip(layers, turns, strict=True)
    )
    return ModelSpec(**common(config, context, tied=True), layers=layers)
