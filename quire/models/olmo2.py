"""OLMo 2: norms after attention and MLP, queries and keys normalised over their full width."""

from __future__ import annotations

from quire.models.config import Config, common, rope, uniform_layers
from quire.models.spec import LayerSpec, ModelSpec, Names

NAMES = Names(
    norms=(
        "model.layers.{i}.post_attention_layernorm",
        "model.layers.{i}.post_feedforward_layernorm",
    )
)


def spec(config: Config, context: int | None) -> ModelSpec:
    """``Olmo2ForCausalLM``."""
    return ModelSpec(
        **common(config, context),
        layers=uniform_layers(config, LayerSpec(rope=rope(config, context))),
        names=NAMES,
        placement="post",
        qk_norm="full",
    )
