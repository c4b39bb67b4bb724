"""The model alone, with the plainest attention: flat batches, incremental steps, half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import MODELS, make
from plain_attend import logits_in_steps

from quire.models.loader import load_model

VARIED = ["llama3", "gemma3", "phi4-partial", "pythia", "qwen3-moe-mixed", "smollm3-window"]


def ragged(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 131, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def expected(oracle: torch.nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [oracle(prompt[None]).logits[0].float() for prompt in prompts]


@pytest.mark.parametrize("name", VARIED)
def test_incremental_steps(name: str, tmp_path: Path) -> None:
    oracle = make(name, tmp_path)
    prompts = ragged(30, 13, 1)
    found = logits_in_steps(load_model(tmp_path), prompts, [5, 1, 9, 1, 1, 1, 1, 11])
    for ours, theirs in zip(found, expected(oracle, prompts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_longrope_beyond_the_original_context(tmp_path: Path) -> None:
    """With a longer context asked for, long factors hold at every position."""
    oracle = make("phi3-longrope", tmp_path)
    prompts = ragged(140, 131)  # both longer than the original 128: transformers takes the long
    short, long = load_model(tmp_path), load_model(tmp_path, context=200)
    assert (short.spec.context, long.spec.context) == (128, 200)
    found = logits_in_steps(long, prompts, [100, 40])
    for ours, theirs in zip(found, expected(oracle, prompts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(MODELS))
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """As close to the float32 logits as transformers is in the same dtype."""
    oracle = make(name, tmp_path)
    prompts = ragged(33, 8)
    exact = torch.cat(expected(oracle, prompts))
    model = load_model(tmp_path, dtype=dtype)
    assert model.dtype == model.layers[0].qkv.product.dtype == dtype
    ours = torch.cat(logits_in_steps(model, prompts, [33]))
    theirs = torch.cat(expected(oracle.to(dtype), prompts))
    assert ours.dtype == torch.float32
    error, bound = (ours - exact).square().mean().sqrt(), (theirs - exact).square().mean().sqrt()
    assert error <= 1.2 * bound
