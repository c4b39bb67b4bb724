"""Gemma 2: four norms a layer, soft caps, every other layer slides."""

from __future__ import annotations

from quire.errors import UnsupportedModelError
from quire.models.config import Config, common, windowed_layers
from quire.models.spec import LayerSpec, ModelSpec, Names

NAMES = Names(
    norms=tuple(
        f"model.layers.{{i}}.{name}_layernorm"
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    )
)


def spec(config: Config, context: int | None) -> ModelSpec:
    """``Gemma2ForCausalLM``."""
    slides = [index % 2 == 0 for index in range(config["num_hidden_layers"])]
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return sandwich(caps | config, context, windowed_layers(config, context, slides))


def sandwich(config: Config, context: int | None, layers: tuple[LayerSpec, ...]) -> ModelSpec:
    """What Gemma 2 and 3 have in common."""
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError("Gemma with use_bidirectional_attention is not supported.")
    shared = common(config, context, tied=True)
    shared["scale"] = config["query_pre_attn_scalar"] ** -0.5
    return ModelSpec(
        **shared,
        layers=layers,
        names=NAMES,
        norm="rms+1",
        placement="sandwich",
        embed_scale=config["hidden_size"] ** 0.5,
        softcap=config.get("attn_logit_softcapping"),
        final_softcap=config.get("final_logit_softcapping"),
    )
