"""Reading a Hugging Face ``config.json``: what most architectures have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models.blocks import ACTIVATIONS
from quire.models.rope import REQUIRED
from quire.models.spec import LayerSpec, Rope

Config = dict[str, Any]


def common(
    config: Config, context: int | None, *, tied: bool = False, eps: str = "rms_norm_eps"
) -> dict[str, Any]:
    """The arguments of `ModelSpec` that are named alike everywhere.

    ``tied``: what holds where the config is silent; ``eps``: the name of the norms' epsilon.
    """
    heads = count(config, "num_attention_heads")
    hidden = count(config, "hidden_size")
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json has {heads} attention heads, not a multiple of {kv_heads} KV heads.",
            value=kv_heads,
            limit=heads,
            action="Download it again.",
        )
    activation = config.get("hidden_activation") or config["hidden_act"]
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"The activation {activation!r} is not supported.",
            value=activation,
            limit=sorted(ACTIVATIONS),
            action=f"Supported are {', '.join(sorted(ACTIVATIONS))}.",
        )
    return {
        "architecture": config["architectures"][0],
        "vocab_size": count(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": count(config, "intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "context": default_context(config, context),
        "scale": head_dim**-0.5,
        "norm_eps": float(config[eps]),
        "activation": activation,
        "tied": config.get("tie_word_embeddings", tied),
        "qkv_bias": bool(config.get("attention_bias")),
        "out_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
    }


def count(config: Config, name: str) -> int:
    """A field that must be a whole number above 0. Raises CheckpointError."""
    value = config[name]
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{name} in config.json is {value!r}, not a whole number above 0.",
            value=value,
            action="Download it again.",
        )
    return value


def default_context(config: Config, asked: int | None) -> int:
    """Longest sequence: ``asked``, within what the model was made for.

    Dynamic and YaRN scaling reach ``factor`` times the original context when asked to.
    """
    longest = count(config, "max_position_embeddings")
    scaling = _scaling(config)
    original = _original(config, scaling)
    if asked is None:
        return original if scaling["rope_type"] == "longrope" else longest
    reach = longest
    if scaling["rope_type"] in ("dynamic", "yarn"):
        reach = max(longest, int(original * scaling.get("factor", 1.0)))
    if not 1 <= asked <= reach:
        fault = f"more than the model's {reach}" if asked > reach else "no room for a token"
        raise UnsupportedModelError(
            f"A context of {asked} tokens is {fault}.",
            value=asked,
            limit=reach,
            action=f"Ask for 1 to {reach}.",
        )
    return asked


def rope(config: Config, context: int | None, *, kind: str = "full_attention") -> Rope:
    """The rotary embedding, for layers of the type ``kind`` where each type has its own.

    Reads ``rope_parameters`` as well as the older ``rope_theta`` with ``rope_scaling``.
    """
    options = _scaling(config, kind)
    original = _original(config, options)
    name = options.pop("rope_type")
    if name not in REQUIRED:
        raise UnsupportedModelError(
            f"The rope type {name!r} is not supported.",
            value=name,
            limit=tuple(REQUIRED),
            action=f"Supported are {', '.join(REQUIRED)}.",
        )
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    part = options.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    dim = int(width * part)
    _check_options(name, options, dim)
    options.setdefault("factor", config["max_position_embeddings"] / original)
    theta = float(options.pop("rope_theta"))
    frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(options.items()))
    return Rope(theta, dim, name, frozen, original, default_context(config, context))


def _check_options(name: str, options: Config, dim: int) -> None:
    for option in REQUIRED[name]:
        value = options[option]
        if isinstance(value, list) and len(value) != dim // 2:
            raise CheckpointError(
                f"The {option} of the {name} rope in config.json has {len(value)} numbers for "
                f"{dim // 2} pairs.",
                value=len(value),
                limit=dim // 2,
                action="Download it again.",
            )
        if not isinstance(value, list if name == "longrope" else (int, float)):
            raise CheckpointError(
                f"The {option} of the {name} rope in config.json is {value!r}.",
                value=value,
                action="Download it again.",
            )


def layer_types(config: Config, default: Sequence[bool]) -> list[bool]:
    """For each layer, whether it has a sliding window; ``default`` where the config is silent."""
    types = config.get("layer_types")
    if types is None:
        return list(default)
    if len(types) != config["num_hidden_layers"]:
        raise CheckpointError(
            f"config.json has {len(types)} layer_types for {config['num_hidden_layers']} layers.",
            value=len(types),
            limit=config["num_hidden_layers"],
            action="Download it again.",
        )
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModelError(
            f"Layers of the type {', '.join(sorted(unknown))} are not supported.",
            value=sorted(unknown),
        )
    return [kind == "sliding_attention" for kind in types]


def uniform_layers(config: Config, layer: LayerSpec) -> tuple[LayerSpec, ...]:
    """All layers alike."""
    return (layer,) * count(config, "num_hidden_layers")


def windowed_layers(
    config: Config, context: int | None, default: Sequence[bool]
) -> tuple[LayerSpec, ...]:
    """Layers with one rotary embedding, of which some slide."""
    turn = rope(config, context)
    window = config.get("sliding_window")
    return tuple(
        LayerSpec(window if slides else None, turn) for slides in layer_types(config, default)
    )


def _scaling(config: Config, kind: str = "full_attention") -> Config:
    """Rope options with ``rope_type`` and ``rope_theta`` always set."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in found.values()):  # one set for each layer type
        found = found.get(kind) or {}
    options = {k: v for k, v in found.items() if v is not None}
    options["rope_type"] = options.pop("rope_type", options.pop("type", None)) or "default"
    options.pop("type", None)
    options.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return options


def _original(config: Config, options: Config) -> int:
    """The context of pre-training, before any scaling."""
    longest = count(config, "max_position_embeddings")
    if options["rope_type"] == "dynamic":  # such configs keep the unscaled context there
        return longest
    name = "original_max_position_embeddings"
    return int(config.get(name) or options.get(name) or longest)
