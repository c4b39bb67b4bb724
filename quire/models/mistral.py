"""Mistral: Llama with a sliding window in every layer, where the config names one."""

from __future__ import annotations

from quire.models.config import Config, common, windowed_layers
from quire.models.spec import ModelSpec


def spec(config: Config, context: int | None) -> ModelSpec:
    """``MistralForCausalLM``."""
    slides = [True] * config["num_hidden_layers"]
    return ModelSpec(**common(config, context), layers=windowed_layers(config, context, slides))
