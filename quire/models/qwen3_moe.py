"""Qwen3-MoE: Qwen 3 with experts in every ``decoder_sparse_step``-th layer."""

from __future__ import annotations

from dataclasses import replace

from quire.models import qwen3
from quire.models.config import Config
from quire.models.spec import Experts, ModelSpec


def spec(config: Config, context: int | None) -> ModelSpec:
    """``Qwen3MoeForCausalLM``."""
    dense = qwen3.spec(config | {"max_window_layers": 0}, context)  # all layers slide, or none
    experts = Experts(
        config.get("num_local_experts") or config["num_experts"],
        config["num_experts_per_tok"],
        config["moe_intermediate_size"],
        renormalise=bool(config.get("norm_topk_prob")),
    )
    step = config.get("decoder_sparse_step", 1)
    plain = set(config.get("mlp_only_layers") or ())
    layers = tuple(
        layer if index in plain or (index + 1) % step else replace(layer, experts=experts)
        for index, layer in enumerate(dense.layers)
    )
    return replace(dense, layers=layers)
