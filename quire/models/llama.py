"""Llama 2 and 3.x, and models shaped like them."""

from __future__ import annotations

from quire.models.config import Config, common, rope, uniform_layers
from quire.models.spec import LayerSpec, ModelSpec


def spec(config: Config, context: int | None) -> ModelSpec:
    """``LlamaForCausalLM``."""
    layer = LayerSpec(rope=rope(config, context))
    return ModelSpec(**common(config, context), layers=uniform_layers(config, layer))
