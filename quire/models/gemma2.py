"""Gemma 2: four norms a layer, soft caps, every other layer slides."""

from __future__ import annotations

from quire.models.config import Config, common, windowed_layers
from quire.models.spec import ModelSpec, Names

NAMES = Names(
    norms=tuple(
        f"model.layers.{{i}}.{name}_layernorm"
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    )
)


def spec(config: Config, context: int | None) -> ModelSpec:
    """``Gemma2ForCausalLM``."""
    slides = [index % 2 == 0 for index in range(config["num_hidden_layers"])]
    shared = common(config, context, tied=True)
    shared["scale"] = config["query_pre_attn_scalar"] ** -0.5
    return ModelSpec(
        **shared,
        layers=windowed_layers(config, context, slides),
        names=NAMES,
        norm="rms+1",
        placement="sandwich",
        embed_scale=config["hidden_size"] ** 0.5,
        softcap=config.get("attn_logit_softcapping"),
        final_softcap=config.get("final_logit_softcapping"),
    )
