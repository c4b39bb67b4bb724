"""Qwen 3: queries and keys are normalised per head."""

from __future__ import annotations

from quire.models import qwen2
from quire.models.config import Config, common
from quire.models.spec import ModelSpec


def spec(config: Config, context: int | None) -> ModelSpec:
    """``Qwen3ForCausalLM``."""
    layers = qwen2.layers(config, context)
    return ModelSpec(**common(config, context), layers=layers, qk_norm="head")
