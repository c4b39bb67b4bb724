"""GGUF files of small models, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

Q = gguf.GGMLQuantizationType
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mixtral": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
}
SHORT = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of rotated heads, reordered so that pairs are next to each other."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def short_name(name: str, architecture: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, suffix = name.rpartition(".")
    if stem in whole:
        return f"{whole[stem]}.{suffix}"
    _, _, index, part = stem.split(".", 3)
    sandwich = architecture in ("gemma2", "gemma3", "olmo2")
    after = "post_attention_norm" if sandwich else "ffn_norm"
    return f"blk.{index}.{({**SHORT, 'post_attention_layernorm': after})[part]}.{suffix}"


def converted(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The architecture and the tensors of a checkpoint folder, as they go into a file."""
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if architecture in ("llama", "smollm3"):
            if ".q_proj." in name:
                weight = neighbours(weight, config["num_attention_heads"])
            if ".k_proj." in name:
                weight = neighbours(weight, config["num_key_value_heads"])
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            weight = weight + 1
        if ".experts." in name:
            front, back = name.split(".experts.")
            number, part, _ = back.split(".")
            stack = f"blk.{front.split('.')[2]}.ffn_{EXPERT[part]}_exps.weight"
            experts.setdefault(stack, {})[int(number)] = weight
        else:
            found[short_name(name, architecture)] = weight
    for name, parts in experts.items():
        found[name] = torch.stack([parts[i] for i in range(len(parts))])
    if config.get("tie_word_embeddings"):
        found.pop("output.weight", None)
    return architecture, found


def add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1.0)))
    if full["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
    if original := full.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if "sliding_attention" in rope:
        writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
    if config.get("sliding_window") and config["model_type"] != "qwen2":
        writer.add_sliding_window(config["sliding_window"])
    if cap := config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(cap)
    if cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)
    if "query_pre_attn_scalar" in config:
        writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
    if count := config.get("num_local_experts") or config.get("num_experts"):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", 0))
        writer.add_expert_weights_norm(config.get("norm_topk_prob", True))


def rope_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        return {
            "rope_factors_long.weight": torch.tensor(rope["long_factor"]),
            "rope_factors_short.weight": torch.tensor(rope["short_factor"]),
        }
    if rope.get("rope_type") != "llama3":
        return {}
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = rope["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1 / ((1 - smooth) / rope["factor"] + smooth)}


def write(path: Path, folder: Path, kinds: dict[str, Q] | None = None) -> Path:
    """The model of a folder in float32; tensors whose name holds a key of ``kinds`` quantised."""
    config = json.loads((folder / "config.json").read_text())
    architecture, tensors = converted(folder)
    writer = gguf.GGUFWriter(path, architecture)
    add_config(writer, config)
    for name, weight in {**tensors, **rope_tensors(config)}.items():
        data = weight.float().numpy()
        kind = next((k for part, k in (kinds or {}).items() if part in name), None)
        if kind is None:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind: Q, rows: int, blocks: int) -> np.ndarray[Any, Any]:
    """Valid bytes of a format: any codes and small scales, ``[rows, bytes]``."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    generator = np.random.default_rng(size)
    raw = generator.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    halves = {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0]}.get(kind.name, [0, 2])
    for at in halves:
        scales = generator.normal(0, 0.002, (rows, blocks, 1)).astype(np.float16)
        raw[..., at : at + 2] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str | None) -> None:
    """The tokenizer.json of a folder; ``pre`` None for SentencePiece."""
    described = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocab: dict[str, int] = dict(described["model"]["vocab"])
    added = {token["content"]: token["id"] for token in described["added_tokens"]}
    merges = [m.split(" ") if isinstance(m, str) else m for m in described["model"]["merges"]]
    vocab |= added
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [3 if token in added else 1 for token in tokens]
    if pre is None:
        rank = {"".join(pair): index for index, pair in reversed(list(enumerate(merges)))}
        kinds = [
            6 if token.startswith("<0x") else k for token, k in zip(tokens, kinds, strict=True)
        ]
        kinds[0] = 2
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(rank.get(token, len(rank))) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_eos_token_id(vocab[config["eos_token"]])
    if bos := config.get("bos_token"):
        writer.add_bos_token_id(vocab[bos])
    if template := config.get("chat_template"):
        writer.add_chat_template(template)
