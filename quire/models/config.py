"""Reading a Hugging Face ``config.json``: what most architectures have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.errors import UnsupportedModelError
from quire.models.blocks import ACTIVATIONS
from quire.models.rope import KINDS
from quire.models.spec import LayerSpec, Rope

Config = dict[str, Any]


def common(config: Config, context: int | None, *, tied: bool = False) -> dict[str, Any]:
    """The arguments of `ModelSpec` that are named alike everywhere. ``tied``: the default."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    activation = config.get("hidden_act") or config.get("hidden_activation")
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"The activation {activation!r} is not supported.",
            value=activation,
            limit=sorted(ACTIVATIONS),
            action=f"Supported are {', '.join(sorted(ACTIVATIONS))}.",
        )
    return {
        "architecture": config["architectures"][0],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "context": default_context(config, context),
        "scale": head_dim**-0.5,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": activation,
        "tied": config.get("tie_word_embeddings", tied),
    }


def default_context(config: Config, asked: int | None) -> int:
    """Longest sequence: ``asked``, within what the model was made for."""
    longest = int(config["max_position_embeddings"])
    if asked is not None and asked > longest:
        raise UnsupportedModelError(
            f"A context of {asked} tokens is more than the model's {longest}.",
            value=asked,
            limit=longest,
            action=f"Ask for at most {longest}.",
        )
    if asked is None and _scaling(config, None).get("rope_type") == "longrope":
        return _original(config, _scaling(config, None))
    return asked or longest


def rope(
    config: Config,
    context: int | None,
    *,
    kind: str | None = None,
    head_dim: int | None = None,
    share: float | None = None,
) -> Rope:
    """The rotary embedding, for layers of the type ``kind`` where there are several.

    ``share`` of each head is rotated. Reads ``rope_parameters`` as well as the older
    ``rope_theta`` with ``rope_scaling``.
    """
    options = _scaling(config, kind)
    name = options.pop("rope_type")
    if name not in KINDS:
        raise UnsupportedModelError(
            f"The rope type {name!r} is not supported.",
            value=name,
            limit=KINDS,
            action=f"Supported are {', '.join(KINDS)}.",
        )
    width = head_dim or config.get("head_dim")
    width = width or config["hidden_size"] // config["num_attention_heads"]
    part = share or options.pop("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    original = _original(config, options)
    longest = config["max_position_embeddings"]
    options.setdefault("factor", longest / original)
    theta = float(options.pop("rope_theta"))
    frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(options.items()))
    return Rope(theta, int(width * part), name, frozen, original, default_context(config, context))


def layer_types(config: Config, default: Sequence[bool]) -> list[bool]:
    """For each layer, whether it has a sliding window; ``default`` where the config is silent."""
    types = config.get("layer_types")
    if types is None:
        return list(default)
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(
            f"Layers of the type {', '.join(sorted(unknown))} are not supported.",
            value=sorted(unknown),
        )
    return [kind == "sliding_attention" for kind in types]


def uniform_layers(config: Config, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """All layers alike."""
    return (layer,) * int(config["num_hidden_layers"])


def windowed_layers(
    config: Config, context: int | None, default: Sequence[bool]
) -> tuple[LayerSpec, ...]:
    """Layers with one rotary embedding, of which some slide."""
    turn = rope(config, context)
    window = config.get("sliding_window")
    return tuple(
        LayerSpec(window if slides else None, turn) for slides in layer_types(config, default)
    )


def _scaling(config: Config, kind: str | None) -> Config:
    """Rope options with ``rope_type`` and ``rope_theta`` always set."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if kind is not None and isinstance(found.get(kind), dict):
        found = found[kind]
    options = {k: v for k, v in found.items() if v is not None}
    options["rope_type"] = options.pop("rope_type", options.pop("type", None)) or "default"
    options.pop("type", None)
    options.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return options


def _original(config: Config, options: Config) -> int:
    """The context of pre-training, before any scaling."""
    return int(
        options.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
