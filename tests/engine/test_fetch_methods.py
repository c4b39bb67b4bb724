"""Every fetch in the engine: batches, chunks, shared prefixes, views, little memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import pages_needed, random_requests, run, tokens
from test_recipes import FetchAll
from test_select_methods import Grouped, requests_of
from torch import Tensor

from quire import LLM, SamplingParams
from quire.engine.facts import _sentence_ends, make_facts
from quire.engine.request import EngineRequest
from quire.kv.method import Facts, Recipe
from quire.kv.recipes import parse
from toy import ByteTokenizer, MockModel, spec

SMALL = {  # -> the same, with a budget for everything
    "squeezed(keep=0.2,window=6,centroids=0.2)": "squeezed(keep=1.0,window=6,centroids=0.2)",
    "squeezed(keep=0.2,window=6,centroids=0.3,levels=2,top=0.1)": "squeezed(keep=1.0,window=3)",
    "sentencekv(budget=24,sinks=4,recent=6,longest=8)": "sentencekv(budget=500)",
    "sparf(budget=0.1,channels=2,recent=4,page=4)": "sparf(budget=500)",
    "sparf(budget=12,channels=0.5,recent=1,page=1,tier=disk)": "sparf(budget=0.9,page=16)",
    "a2ats(keep=0.05,sinks=2,recent=6,distance=100)": "a2ats(keep=0.5)",
    "sentencekv(budget=24,sinks=4,recent=6,whole_first=true)": "sentencekv(budget=130,longest=9)",
}


def a_tree(seed: int, output: int = 12) -> list[EngineRequest]:
    """Prompts with a long common beginning, two samples each."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(1, 256, 120).tolist()
    ends = [rng.integers(1, 256, size).tolist() for size in (1, 40, 70, 3)]
    return requests_of([[*shared, *end] for end in ends], output, 2)


@pytest.mark.parametrize("text", SMALL)
def test_chunks_and_kernels_change_nothing(text: str) -> None:
    requests = a_tree(1)
    recipe = parse(text)
    exact, _ = run(requests, model=Grouped())
    wanted, _ = run(requests, model=Grouped(), recipe=recipe)
    assert tokens(wanted) != tokens(exact)
    for chunk, plain in ((512, True), (31, False)):
        found, _ = run(requests, model=Grouped(), recipe=recipe, chunk=chunk, plain=plain)
        assert tokens(found) == tokens(wanted)


@pytest.mark.parametrize("text", SMALL.values())
def test_a_budget_for_everything_reads_everything(text: str) -> None:
    for seed in (1, 2):
        exact, _ = run(a_tree(seed), model=Grouped())
        found, _ = run(a_tree(seed), model=Grouped(), recipe=parse(text))
        assert tokens(found) == tokens(exact)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("text", [None, *SMALL.values()])
def test_a_window_hides_what_is_chosen(text: str | None, plain: bool) -> None:
    recipe = Recipe(fetch=FetchAll()) if text is None else parse(text)
    requests = a_tree(1)
    exact, _ = run(requests, model=MockModel(spec(window=20)))
    found, _ = run(requests, model=MockModel(spec(window=20)), recipe=recipe, plain=plain)
    assert tokens(found) == tokens(exact)


@pytest.mark.slow
@pytest.mark.parametrize("text", SMALL)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    extra=st.sampled_from([0, 2, 50]),
    chunk=st.sampled_from([3, 64]),
    windows=st.sampled_from([None, 2]),
    also=st.sampled_from(["", "snapkv(budget=40,window=4)+", "streaming(budget=60,every=none)+"]),
)
def test_any_memory_will_do(
    text: str, seed: int, extra: int, chunk: int, windows: int | None, also: str
) -> None:
    requests = random_requests(seed)
    pages = max(map(pages_needed, requests)) + extra
    found, _ = run(requests, recipe=parse(also + text), pages=pages, chunk=chunk, windows=windows)
    for request in requests:
        samples = found[request.id].samples
        assert len(samples) == request.params.n
        for sample in samples:
            full = len(sample.token_ids) == request.params.max_tokens
            assert full or sample.finish_reason == "stop"


@pytest.mark.parametrize("text", SMALL)
def test_views_and_packed_entries(text: str) -> None:
    """After a selection, and of what a store has packed, in one recipe."""
    recipe = parse(f"snapkv(budget=100,window=8)+kivi(bits=4,residual=16)+{text}")
    requests = a_tree(3)
    whole, _ = run(requests, model=Grouped(), recipe=recipe)
    pages = 2 * max(map(pages_needed, requests))
    tight, _ = run(requests, model=Grouped(), recipe=recipe, pages=pages)
    assert tokens(tight) == tokens(whole)


@dataclass(frozen=True)
class Watching:
    """Remembers the queries that it is given, by the path's tokens."""

    seen: dict[bytes, list[Tensor]]
    window: int = 5

    def index(self, facts: Facts, layers: Any, ids: Any, queries: Any) -> None:
        assert len(ids) > int(layers(0).positions.max())
        self.seen[ids.tobytes()] = [queries(layer).clone() for layer in range(facts.layers)]


@pytest.mark.parametrize("text", ["none", "streaming(budget=16,every=none)", "snapkv(budget=20)"])
def test_the_last_queries_of_a_node(text: str) -> None:
    """The same whatever the chunks; of a view, those of its whole prompt."""
    requests = a_tree(2)
    found: list[dict[bytes, list[Tensor]]] = []
    for chunk in (512, 2, 31):
        found.append({})
        recipe = replace(parse(text), fetch=Watching(found[-1]))
        run(requests, model=Grouped(), recipe=recipe, chunk=chunk)
    one, *others = found
    assert {len(queries) for queries in one.values()} == {2}
    wanted = {request.prompt.tobytes() for request in requests}
    if text == "none":
        wanted.add(requests[0].prompt[:120].tobytes())
        assert {len(queries[0]) for queries in one.values()} == {1, 3, 5}
    else:
        assert {len(queries[0]) for queries in one.values()} == {5}
    assert one.keys() == wanted
    for other in others:
        assert other.keys() == wanted
        for key, queries in other.items():
            torch.testing.assert_close(queries, one[key])


def test_ends_of_sentences() -> None:
    found = make_facts(Grouped(), ByteTokenizer()).sentence_ends()  # type: ignore[arg-type]
    assert found is not None
    assert {chr(i) for i in found.nonzero().flatten().tolist()} == set(".!?")
    assert make_facts(Grouped(), None).sentence_ends() is None  # type: ignore[arg-type]


@pytest.mark.slow
def test_ends_of_sentences_of_a_real_tokenizer() -> None:
    with LLM("demo", kv="sentencekv") as llm:
        tokenizer = llm.tokenizer
    ends = _sentence_ends(tokenizer.vocab_size, tokenizer)
    assert ends is not None
    ids = torch.tensor(tokenizer.encode('It was dark. "Who is there?" Nobody, said he!\n\nSo'))
    text = [tokenizer.token_text(int(i)) for i in ids[ends[ids]]]
    assert len(text) in (3, 4, 5)
    assert all(any(c in one for c in ".?!\n") for one in text)


@pytest.mark.slow
@pytest.mark.parametrize("text", SMALL)
def test_the_demonstration_model(text: str) -> None:
    story = "It was a dark and stormy night, and the old man sat by the fire. " * 6
    prompts = [story + end for end in ("Then", "The dog barked and", "She said that")]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=2)
    outputs = []
    for chunk in (512, 33):
        with LLM("demo", kv=text, kv_memory="64MiB", chunk=chunk, dtype="float32") as llm:
            outputs.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
    assert outputs[0] == outputs[1]
    assert all(len(ids) == 12 for ids in outputs[0])
