"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from quire.models import mistral
from quire.models.config import Config
from quire.models.spec import Experts, ModelSpec, Names

_MOE = "model.layers.{i}.block_sparse_moe"
NAMES = Names(
    router=f"{_MOE}.gate",
    expert_up=(_MOE + ".experts.{e}.w1", _MOE + ".experts.{e}.w3"),
    expert_down=_MOE + ".experts.{e}.w2",
)


def spec(config: Config, context: int | None) -> ModelSpec:
    """``MixtralForCausalLM``."""
    config = {"rope_theta": 1e6, **config}
    dense = mistral.spec(config, context)
    experts = Experts(
        config["num_local_experts"],
        config["num_experts_per_tok"],
        config["intermediate_size"],
        renormalise=True,
    )
    layers = tuple(replace(layer, experts=experts) for layer in dense.layers)
    return replace(dense, layers=layers, names=NAMES)
