"""The metadata of a GGUF file as a Hugging Face ``config.json``.

The keys are those that llama.cpp's converter writes; where it leaves something out because
llama.cpp knows it by heart, so does this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models.config import Config
from quire.models.gguf import ADVICE, GGUFFile


class _Fields:
    """Checked access to the metadata of a file's architecture."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def value(self, name: str) -> object:
        """None if the file does not have it; a list of equal numbers counts as one."""
        found = self.file.metadata.get(f"{self.file.architecture}.{name}")
        return found[0] if isinstance(found, list) and len(set(found)) == 1 else found

    def whole(self, name: str, default: int | None = None) -> int:
        found = self.value(name)
        found = default if found is None else found
        if isinstance(found, list):
            raise UnsupportedModelError(
                f"{self.file.folder}: {name} differs from layer to layer, which is not supported.",
                value=found,
            )
        if type(found) is not int:
            raise self._wrong(name, found)
        return found

    def number(self, name: str, default: float | None = None) -> float:
        found = self.value(name)
        found = default if found is None else found
        if type(found) not in (int, float):
            raise self._wrong(name, found)
        return float(found)  # type: ignore[arg-type]

    def _wrong(self, name: str, found: object) -> CheckpointError:
        where = f"{self.file.folder}: the metadata"
        fault = "lacks" if found is None else f"has {found!r} as"
        return CheckpointError(
            f"{where} {fault} {self.file.architecture}.{name}.", value=found, action=ADVICE
        )


def gguf_config(file: GGUFFile) -> Config:
    """The ``config.json`` of the model in ``file``. Raises ModelError."""
    if file.architecture not in _FAMILIES:
        raise UnsupportedModelError(
            f"{file.folder}: GGUF files of the architecture {file.architecture} are not supported.",
            value=file.architecture,
            limit=sorted(_FAMILIES),
            action=f"Supported are {', '.join(sorted(_FAMILIES))}.",
        )
    name, extra = _FAMILIES[file.architecture]
    fields = _Fields(file)
    names = set(file.names())
    heads = fields.whole("attention.head_count")
    hidden = fields.whole("embedding_length")
    head_dim = fields.whole("attention.key_length", hidden // max(heads, 1))
    if fields.whole("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{file.folder}: keys and values of different widths are not supported.",
            value=fields.value("attention.value_length"),
            limit=head_dim,
        )
    layer = "model.layers.0."
    config: Config = {
        "architectures": [name],
        "vocab_size": file.header("model.embed_tokens.weight")[0][0],
        "hidden_size": hidden,
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_hidden_layers": fields.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": layer + "self_attn.q_proj.bias" in names,
        "mlp_bias": layer + "mlp.down_proj.bias" in names,
    }
    return config | _rope(fields, config) | extra(fields, config)


def _rope(fields: _Fields, config: Config) -> Config:
    """The rotary embedding and its scaling."""
    found: Config = {"rope_theta": fields.number("rope.freq_base", 10000.0)}
    turned = fields.whole("rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"]:
        found["partial_rotary_factor"] = turned / config["head_dim"]
    scaling = _scaling(fields, config["max_position_embeddings"])
    return found | {"rope_scaling": scaling} if scaling else found


def _scaling(fields: _Fields, context: int) -> Config | None:
    rope = fields.file.rope
    factor = fields.number("rope.scaling.factor", 0.0)
    kind = fields.value("rope.scaling.type") or ("linear" if factor else "none")
    original = fields.whole("rope.scaling.original_context_length", context)
    if {"rope_factors_long", "rope_factors_short"} <= rope.keys():
        found: Config = {
            "rope_type": "longrope",
            "long_factor": rope["rope_factors_long"].tolist(),
            "short_factor": rope["rope_factors_short"].tolist(),
            "original_max_position_embeddings": original,
        }
        if fields.value("rope.scaling.attn_factor") is not None:
            found["attention_factor"] = fields.number("rope.scaling.attn_factor")
        return found
    if "rope_freqs" in rope and kind == "none":
        # What the llama3 scaling divides each frequency by; its options are not in the file, and
        # need not be: this is a longrope with one set of factors for every context.
        factors = rope["rope_freqs"].tolist()
        return {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }
    if kind == "none":
        return None
    if kind == "linear" and "rope_freqs" not in rope:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and "rope_freqs" not in rope and factor > 0:
        return _yarn(fields, factor, original)
    raise UnsupportedModelError(
        f"{fields.file.folder}: the rope scaling {kind!r} is not supported in this form.",
        value=kind,
        action="Use the model's safetensors version.",
    )


def _yarn(fields: _Fields, factor: float, original: int) -> Config:
    for name, plain in (("yarn_ext_factor", (1.0, -1.0)), ("yarn_log_multiplier", (0.0,))):
        value = fields.number(f"rope.scaling.{name}", plain[0])
        if value not in plain:
            raise UnsupportedModelError(
                f"{fields.file.folder}: YaRN with {name} {value:g} is not supported.",
                value=value,
                limit=plain,
                action="Use the model's safetensors version.",
            )
    found: Config = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    extra = fields.number("rope.scaling.attn_factor", 1.0)
    extra *= fields.number("rope.scaling.yarn_attn_factor", 1.0)
    if extra != 1.0:  # llama.cpp multiplies the usual magnitude by it
        found["attention_factor"] = extra * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return found


def _layer_types(fields: _Fields, layers: int) -> Config:
    """Which layers slide, if the file says so: one flag for each, or the period of full ones."""
    key = f"{fields.file.architecture}.attention.sliding_window_pattern"
    found = fields.file.metadata.get(key)
    if found is None:
        return {}
    if isinstance(found, int):
        found = [index % found < found - 1 for index in range(layers)]
    return {"layer_types": ["sliding_attention" if s else "full_attention" for s in found]}


def _plain(fields: _Fields, config: Config) -> Config:  # noqa: ARG001
    return {}


def _llama(fields: _Fields, config: Config) -> Config:  # noqa: ARG001
    count = fields.whole("expert_count", 0)
    if not count:
        return {}
    return {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": count,
        "num_experts_per_tok": fields.whole("expert_used_count"),
    }


def _qwen3_moe(fields: _Fields, config: Config) -> Config:
    names = set(fields.file.names())
    layers = range(config["num_hidden_layers"])
    return {
        "num_experts": fields.whole("expert_count"),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "moe_intermediate_size": fields.whole("expert_feed_forward_length"),
        "norm_topk_prob": fields.value("expert_weights_norm") is not False,
        "mlp_only_layers": [i for i in layers if f"model.layers.{i}.mlp.gate.weight" not in names],
    }


def _gemma(fields: _Fields, config: Config, deepest: int) -> Config:
    # The largest model of each generation scales scores by the width that its heads would have
    # if they filled the hidden size; the converter does not write it.
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    wide = config["hidden_size"] // config["num_attention_heads"]
    scale = fields.number("attention.scale", (wide if layers == deepest else head_dim) ** -0.5)
    found: Config = {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": scale**-2}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.value(name) is not None:
            found[name] = fields.number(name)
    return found | _layer_types(fields, layers)


def _gemma2(fields: _Fields, config: Config) -> Config:
    window = {"sliding_window": fields.whole("attention.sliding_window", 4096)}
    return _gemma(fields, config, 46) | window


def _gemma3(fields: _Fields, config: Config) -> Config:
    found = _gemma(fields, config, 62)
    found["rope_local_base_freq"] = fields.number("rope.freq_base_swa", 10000.0)
    found["sliding_window"] = fields.value("attention.sliding_window")
    if found["sliding_window"] is None:
        found["sliding_window_pattern"] = 1  # every layer is full
    return found


def _phi3(fields: _Fields, config: Config) -> Config:  # noqa: ARG001
    window = fields.whole("attention.sliding_window", 0)  # 0 stands for none
    return {"sliding_window": window or None}


def _olmo2(fields: _Fields, config: Config) -> Config:  # noqa: ARG001
    if fields.value("attention.sliding_window") is not None:
        raise UnsupportedModelError(
            f"{fields.file.folder}: OLMo with a sliding window (OLMo 3) is not supported.",
            value=fields.value("attention.sliding_window"),
        )
    return {}


_FAMILIES: dict[str, tuple[str, Callable[[_Fields, Config], Config]]] = {
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3": ("Gemma3ForCausalLM", _gemma3),
    "llama": ("LlamaForCausalLM", _llama),
    "olmo2": ("Olmo2ForCausalLM", _olmo2),
    "phi3": ("Phi3ForCausalLM", _phi3),
    "qwen2": ("Qwen2ForCausalLM", _plain),
    "qwen3": ("Qwen3ForCausalLM", _plain),
    "qwen3moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "smollm3": ("SmolLM3ForCausalLM", _plain),
}
