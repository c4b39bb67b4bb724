"""Stores in the engine: packed blocks of prompts and outputs, shared, preempted, cut by chunks."""

from __future__ import annotations

import random

import numpy as np
import pytest
from test_engine import pages_by_step, pages_needed, random_requests, run, tokens

from quire import LLM, SamplingParams
from quire.engine.request import EngineRequest
from quire.kv.recipes import parse

STORES = [
    "int8(block=16)",
    "int8(block=8,group=4)",
    "fp8(block=16)",
    "bfp(bits=8,block=16)",
    "bfp(bits=8,block=16,sort=false,group=16)",
    "rotatekv(bits=8,block=16)",
    "rotatekv(bits=4,block=32,rope=post,sinks=1,group=4)",
    "xkv(group=2,key_rank=0.4,value_rank=0.4)",
    "cskv(density=1.0,window=16,bits=8)",
    "lowrank(rank=0.4,chunk=4,outliers=1,local=1)",
]


def requests_of(prompts: list[list[int]], output: int) -> list[EngineRequest]:
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, n=2)
    return [
        EngineRequest(i, np.array(ids, dtype=np.int32), params, i) for i, ids in enumerate(prompts)
    ]


def prompt(size: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, 256) for _ in range(size)]


@pytest.mark.parametrize("text", STORES)
def test_memory_chunks_and_company(text: str) -> None:
    """Whatever is packed when, all is written; and alike by both ways to compute it."""
    for seed in range(3):
        requests = random_requests(seed)
        pages = max(pages_needed(r) for r in requests) + 2
        for chunk, windows, policy in ((7, None, "batch"), (64, 2, "fcfs")):
            found, _ = run(
                requests,
                recipe=parse(text),
                pages=pages,
                chunk=chunk,
                windows=windows,
                policy=policy,
                plain=bool(seed % 2),
            )
            assert len(found) == len(requests)
            assert all(result.error is None for result in found.values())


@pytest.mark.parametrize("text", STORES)
def test_the_same_again(text: str) -> None:
    """What a prompt gives is not changed by another that has nothing to do with it."""
    requests = requests_of([prompt(50, 1), prompt(90, 2), prompt(5, 3)], 12)
    together = tokens(run(requests, recipe=parse(text))[0])
    for request in requests:
        assert tokens(run([request], recipe=parse(text))[0])[request.id] == together[request.id]


@pytest.mark.parametrize("text", STORES)
@pytest.mark.parametrize(
    "select", ["snapkv(budget=40,window=8)", "streaming(budget=40,every=none)"]
)
def test_what_a_selection_keeps_is_packed(text: str, select: str) -> None:
    requests = requests_of([prompt(120, 1), prompt(90, 2)], 20)
    found, _ = run(requests, recipe=parse(f"{select}+{text}"), chunk=33)
    assert all(len(ids) == 20 for result in tokens(found).values() for ids in result)


@pytest.mark.parametrize("text", STORES)
def test_what_is_packed_is_fetched(text: str) -> None:
    requests = requests_of([prompt(120, 1), prompt(90, 2)], 20)
    fetch = "landmarks(budget=16,chunk=4,outliers=1,local=1)"
    found, _ = run(requests, recipe=parse(f"{text}+{fetch}"), chunk=33)
    assert all(len(ids) == 20 for result in tokens(found).values() for ids in result)


@pytest.mark.parametrize("text", STORES)
def test_packing_frees_memory(text: str) -> None:
    used = pages_by_step(requests_of([prompt(400, 0)], 15), text)
    assert max(used) >= 24  # nearly all of the prompt, once
    assert used[-1] < 24


@pytest.mark.slow
@pytest.mark.parametrize("text", STORES)
def test_the_demonstration_model(text: str) -> None:
    """At first it says what it says with the exact cache; how it is cut changes nothing much."""
    story = "It was a dark and stormy night, and the old man sat by the fire. " * 3
    prompts = [story + end for end in ("Then", "The dog barked and", "She said that")]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, n=2)
    outputs = []
    for kv, chunk in (("none", 512), (text, 512), (text, 33)):
        with LLM("demo", kv=kv, kv_memory="1MiB", chunk=chunk, dtype="float32") as llm:
            outputs.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
    assert all(len(ids) == 24 for found in outputs for ids in found)
    assert [ids[:4] for ids in outputs[0]] == [ids[:4] for ids in outputs[1]]
    assert [ids[:4] for ids in outputs[1]] == [ids[:4] for ids in outputs[2]]
