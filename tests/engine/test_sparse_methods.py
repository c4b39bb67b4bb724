"""Sparse prefills in the engine: whole prompts, chunks, shared beginnings, little memory."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import pages_needed, random_requests, run, tokens
from test_recipes import long_request

from quire import LLM, SamplingParams
from quire.engine.request import EngineRequest
from quire.kv.recipes import METHODS, parse

EVERYTHING = [  # reads all there is
    "pbs(threshold=1.0,block=4,segment=8)",
    "pbs(threshold=1.0,block=4,segment=8,permute=false)",
    "dhsa(budget=8,chunk=4,first=1000,block=4,tail=3)",
]
LITTLE = [
    "pbs(threshold=0.3,block=4,segment=8)",
    "pbs(threshold=0.3,block=4,segment=8,permute=false)",
    "dhsa(budget=20,chunk=4,first=4,newest=6,block=5,tail=3)",
    "dhsa(budget=24,chunk=6,boundaries=similar,first=2,newest=0,block=4,shared=false)",
]


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    text=st.sampled_from(EVERYTHING),
    more=st.sampled_from(
        ["", "+kivi(bits=8)", "+snapkv(budget=24,window=8)", "+landmarks(budget=16,chunk=4)"]
    ),
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(["batch", "fcfs"]),
    extra=st.sampled_from([0, 3, 50]),
    chunk=st.sampled_from([1, 7, 64, 512]),
)
def test_reading_everything_changes_nothing(
    text: str, more: str, seed: int, policy: str, extra: int, chunk: int
) -> None:
    requests = random_requests(seed)
    pages = max(pages_needed(r) for r in requests) + extra
    options = {"policy": policy, "pages": pages, "chunk": chunk}
    wanted, _ = run(requests, recipe=parse(more[1:]), **options)
    found, _ = run(requests, recipe=parse(text + more), **options)
    assert tokens(found) == tokens(wanted)


@pytest.mark.parametrize("text", LITTLE)
def test_reading_little(text: str) -> None:
    """Every request ends, and its tokens depend on what the prompt's blocks read."""
    rng = random.Random(0)
    shared = [rng.randrange(1, 256) for _ in range(120)]
    params = replace(long_request(0, 1, 8).params, n=2)
    requests = [
        EngineRequest(i, np.array([*shared, *range(i + 1, i + 40)], dtype=np.int32), params, i)
        for i in range(4)
    ]
    exact, _ = run(requests)
    differs = 0
    for chunk in (16, 50, 512):
        found, engine = run(requests, recipe=parse(text), chunk=chunk, pages=40)
        assert all(len(ids) == 8 for samples in tokens(found).values() for ids in samples)
        assert engine.world.counters.prompt_computed >= 120 + 4 * 39
        differs += tokens(found) != tokens(exact)
    assert differs


@pytest.mark.slow
@pytest.mark.parametrize("text", EVERYTHING)
def test_the_demonstration_model(text: str) -> None:
    """Native kernels over copies of everything: the tokens of plain attention."""
    text = text.replace("block=4,segment=8", "block=32,segment=64")
    story = "It was a dark and stormy night, and the old man sat by the fire. " * 12
    prompts = [story + end for end in ("Then", "The dog barked and", "She said that")]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=2)
    outputs = []
    for recipe, chunk, memory in (("none", 512, "64MiB"), (text, 512, "64MiB"), (text, 77, "2MiB")):
        with LLM("demo", kv=recipe, kv_memory=memory, chunk=chunk, dtype="float32") as llm:
            outputs.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
    assert outputs[0] == outputs[1] == outputs[2]


def test_every_sparse_prefill_is_tested() -> None:
    names = {name for name, make in METHODS.items() if getattr(make, "axis", "") == "sparse"}
    assert {text.partition("(")[0] for text in EVERYTHING} == names
    assert {text.partition("(")[0] for text in LITTLE} == names
