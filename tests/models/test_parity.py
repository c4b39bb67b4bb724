"""Every architecture against transformers, on small random configurations in float32.

The engine itself runs the model: ragged batches, chunked prefill, paged KV.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from quire.decode.params import SamplingParams
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.models.loader import load_model
from quire.schedule.policies import POLICIES

BASE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}


def rope(kind: str, **options: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LONG = rope(
    "longrope",
    short_factor=[1.0 + 0.1 * i for i in range(4)],
    long_factor=[2.0 + 0.3 * i for i in range(4)],
    original_max_position_embeddings=128,
)
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biased": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama3": ("Llama", LLAMA3),
    "llama-linear": ("Llama", rope("linear", factor=4.0)),
    "llama-dynamic": ("Llama", rope("dynamic", factor=4.0)),
    "llama-yarn": (
        "Llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "mistral": ("Mistral", {"sliding_window": 11}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 24},
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-longrope": ("Phi3", {"original_max_position_embeddings": 128, **LONG}),
    "phi4-partial": ("Phi3", {"partial_rotary_factor": 0.75, "head_dim": 16}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "pythia": ("GPTNeoX", {"rotary_pct": 0.5, "hidden_act": "gelu"}),
    "pythia-serial": ("GPTNeoX", {"use_parallel_residual": False, "hidden_act": "gelu"}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 5, "norm_topk_prob": True, **MOE}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {"num_experts": 4, "mlp_only_layers": [0], "norm_topk_prob": False, **MOE},
    ),
}


def make(name: str, folder: Path) -> torch.nn.Module:
    """A random model of transformers, saved to ``folder``."""
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**BASE, **changes})
    torch.manual_seed(len(name))
    kind = "Gemma3" if family == "Gemma3Text" else family
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            weight.normal_(0.5 * centre, 0.15)
    model.save_pretrained(folder)
    return model


def engine(folder: Path, chunk: int = 32) -> Engine:
    return Engine(
        load_model(folder, dtype=torch.float32),
        None,
        policy=POLICIES["batch"],
        kv_bytes=8 << 20,
        chunk=chunk,
    )


def ragged(lengths: list[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    shared = generator.integers(3, 131, 20)
    prompts = [generator.integers(3, 131, n).astype(np.int32) for n in lengths]
    for prompt in prompts[1:]:
        prompt[: min(20, len(prompt) - 1)] = shared[: min(20, len(prompt) - 1)]
    return prompts


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_at_every_position(name: str, tmp_path: Path) -> None:
    oracle = make(name, tmp_path)
    prompts = ragged([1, 7, 40, 23])
    ours = engine(tmp_path)
    rows: dict[int, list[torch.Tensor]] = {}
    run = ours.runner.forward

    def record(works: list) -> torch.Tensor:
        hidden = run(works)
        logits = ours.runner.model.logits(hidden)
        at = 0
        for work in works:
            for seq in ours.world.state.running:
                if work.node in seq.leaf.path():
                    rows.setdefault(seq.request, []).append(logits[at : at + work.item.count])
            at += work.item.count
        return hidden

    ours.runner.forward = record  # type: ignore[method-assign]
    params = SamplingParams(temperature=0.0, max_tokens=1)
    ours.add(EngineRequest(i, p, params, 0) for i, p in enumerate(prompts))
    while ours.unfinished:
        ours.step()
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = oracle(torch.from_numpy(prompt).long()[None]).logits[0]
        found = torch.cat(rows[index])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [n if n == "llama3" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_greedy_tokens(name: str, tmp_path: Path) -> None:
    oracle = make(name, tmp_path)
    prompts = ragged([5, 33, 21])
    ours = engine(tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    ours.add(EngineRequest(i, p, params, 0) for i, p in enumerate(prompts))
    found: dict[int, list[int]] = {}
    while ours.unfinished:
        for result in ours.step():
            found[result.id] = result.samples[0].token_ids
    for index, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt).long()[None]
        with torch.no_grad():
            for _ in range(64):
                ids = torch.cat([ids, oracle(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert found[index] == ids[0, len(prompt) :].tolist()
