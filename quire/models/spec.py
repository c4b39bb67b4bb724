"""What an architecture is, as data: the model is written once over a `ModelSpec`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Norm = Literal["rms", "rms+1", "layer"]  # "rms+1" multiplies by 1 + weight
Placement = Literal["pre", "post", "sandwich", "parallel"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. ``kind`` and ``options`` are explained in `rope.py`; ``dim`` is the rotated
    part of the head, ``context`` the length that the engine runs."""

    theta: float
    dim: int
    kind: str = "default"
    options: tuple[tuple[str, object], ...] = ()
    original: int = 0
    context: int = 0


@dataclass(frozen=True)
class Experts:
    """Mixture of experts: ``top`` of ``count`` for each token; ``renormalise`` their weights."""

    count: int
    top: int
    intermediate: int
    renormalise: bool


@dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer. ``window`` = w: position p reads (p - w, p]."""

    window: int | None = None
    rope: Rope | None = None  # None: no position encoding
    experts: Experts | None = None  # None: dense


@dataclass(frozen=True)
class Names:
    """Checkpoint names; ``{i}`` stands for the layer, ``{e}`` for the expert.

    Several names for one matrix are concatenated along the output dimension.
    """

    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = tuple(f"model.layers.{{i}}.self_attn.{p}_proj" for p in "qkv")
    out: str = "model.layers.{i}.self_attn.o_proj"
    q_norm: str = "model.layers.{i}.self_attn.q_norm"
    k_norm: str = "model.layers.{i}.self_attn.k_norm"
    up: tuple[str, ...] = ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj")
    down: str = "model.layers.{i}.mlp.down_proj"
    norms: tuple[str, ...] = (  # in the order in which a layer applies them
        "model.layers.{i}.input_layernorm",
        "model.layers.{i}.post_attention_layernorm",
    )
    router: str = "model.layers.{i}.mlp.gate"
    expert_up: tuple[str, ...] = (
        "model.layers.{i}.mlp.experts.{e}.gate_proj",
        "model.layers.{i}.mlp.experts.{e}.up_proj",
    )
    expert_down: str = "model.layers.{i}.mlp.experts.{e}.down_proj"


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer.

    ``placement``: "pre" normalises the input of attention and MLP, "post" their output (OLMo 2),
    "sandwich" both (Gemma), "parallel" feeds both from the layer's input (GPT-NeoX). ``qk_norm``:
    per head, over the full width, or none. ``gated``: the MLP is ``down(act(gate) * up)``.
    ``interleaved_qkv``: the fused matrix holds q, k, v head by head. ``qkv_bias``, ``out_bias``,
    ``mlp_bias``: which projections have biases. ``scale`` multiplies the attention scores,
    ``softcap`` bounds them (Gemma 2), ``final_softcap`` bounds the logits.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    context: int
    scale: float
    norm_eps: float
    activation: str
    tied: bool
    names: Names = field(default_factory=Names)
    norm: Norm = "rms"
    placement: Placement = "pre"
    qk_norm: Literal["head", "full"] | None = None
    gated: bool = True
    interleaved_qkv: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float | None = None
    softcap: float | None = None
    final_softcap: float | None = None
