"""Write a Llama checkpoint as a GGUF file, with a vocabulary of numbered tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tensors import as_float, read_tensors

TYPES = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "int4": gguf.GGMLQuantizationType.Q4_0,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, file: Path, precision: str) -> None:
    """All matrices in one precision: bf16, int8 (Q8_0) or int4 (Q4_0); norms in float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    _write_sizes(writer, config)
    _write_vocabulary(writer, config["vocab_size"])
    kind = TYPES[precision]
    for name, (stored, values) in read_tensors(checkpoint / "model.safetensors").items():
        full = as_float(stored, values)
        if full.ndim == 1:
            writer.add_tensor(gguf_name(name), full)
            continue
        if "q_proj" in name:
            full = _interleaved(full, config["num_attention_heads"])
        elif "k_proj" in name:
            full = _interleaved(full, config["num_key_value_heads"])
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(full, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """The name that llama.cpp gives to a tensor of a Hugging Face checkpoint."""
    own = name.removesuffix(".weight")
    if own.startswith("model.layers."):
        _, _, index, rest = own.split(".", 3)
        return f"blk.{index}.{NAMES[rest]}.weight"
    return f"{NAMES[own]}.weight"


def _interleaved(matrix: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows in the order of llama.cpp: the two halves of a rotated pair side by side."""
    rows, columns = matrix.shape
    halves = matrix.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _write_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Special tokens, then numbered ones: enough for a loader that insists on a vocabulary."""
    special = ["<unk>", "<s>", "</s>", "<0x0A>"]
    normal = [f"t{number}" for number in range(len(special), size)]
    kind = gguf.TokenType
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, kind.BYTE]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + normal)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(kinds + [kind.NORMAL] * len(normal))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
