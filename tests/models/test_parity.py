"""Every architecture against transformers, on small random configurations in float32.

The engine itself runs the model: ragged batches, chunked prefill, paged KV.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import MODELS, make

from quire.attention.segments import last_rows
from quire.decode.params import SamplingParams
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.models.loader import load_model
from quire.schedule.policies import POLICIES


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

    def record(works: list, wanted: list[int]) -> torch.Tensor:
        hidden = run(works)
        logits = ours.runner.model.logits(hidden)
        at = 0
        for work in works:
            for seq in ours.world.state.running:
                if work.node in seq.leaf.path():
                    rows.setdefault(seq.request, []).append(logits[at : at + work.item.count])
            at += work.item.count
        return hidden[last_rows([work.item for work in works], wanted)[1]]

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
