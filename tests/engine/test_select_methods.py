"""Every selection in the engine, against a decoder that runs one sequence token by token."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import pages_by_step, pages_needed, random_requests, run, tokens
from torch import Tensor

from quire import LLM, SamplingParams
from quire.engine.facts import make_facts
from quire.engine.request import EngineRequest
from quire.errors import InvalidRequestError
from quire.kv.method import Entries, Seen, join
from quire.kv.recipes import METHODS, parse
from quire.models.spec import ModelSpec
from toy import MockModel, spec

METHODS_SMALL = [
    "streaming(budget=16,sinks=2,every=1)",
    "streaming(budget=0.5,every=4)",
    "h2o(budget=16,every=1)",
    "h2o(budget=0.4,recent=3,fair=true,every=5)",
    "h2o(budget=12,every=none)",
    "scissorhands(budget=20,window=8,recent=4,every=1)",
    "scissorhands(budget=0.5,window=300,tilt=0.5,every=3)",
    "snapkv(budget=24,window=8)",
    "snapkv(budget=0.3,window=4,pool=avg,kernel=3,tilt=-0.5)",
    "prefixkv(budget=0.4,distance=-5,every=1)",
    "prefixkv(budget=20,distance=-8,every=4)",
    "elastic(budget=0.4,distance=-5,every=4)",
    "elastic(budget=20,reach=3,distance=-8)",
    "kvmerger(budget=0.5,eps=0.0)",
    "kvmerger(budget=1,eps=0.0,value_mass=false,mass_bias=true)",
    "chelsea(budget=0.5,chunk=6,recent=4)",
    "chelsea(budget=18,chunk=4,recent=4,mass_bias=true)",
]


def two_heads(layers: int = 2) -> ModelSpec:
    return replace(spec(layers), heads=4, kv_heads=2)


@dataclass
class Grouped(MockModel):
    """Four query heads and two KV heads."""

    spec: ModelSpec = field(default_factory=two_heads)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.stack([x, x.flip(-1), x.roll(2, -1), -x], dim=1)
        return q, torch.stack([x, x.roll(3, -1)], dim=1), torch.stack([x.roll(1, -1), x], dim=1)


@dataclass
class Alone:
    """One sequence under a selection, token by token; a list has one element a layer."""

    model: MockModel
    method: Any
    prompt: int = 0
    tokens: int = 0
    held: list[Entries] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, _rotation: None) -> Tensor:
        at = torch.full((k.shape[1], 1), self.tokens)
        new = Entries(k.transpose(0, 1), v.transpose(0, 1), at)
        none = torch.zeros(k.shape[1], 1)
        if layer == len(self.held):
            self.held.append(new)
            self.mass.append(none)
            self.queries.append(q)
        else:
            self.held[layer] = join([self.held[layer], new])
            self.mass[layer] = torch.cat([self.mass[layer], none], dim=1)
            self.queries[layer] = torch.cat([self.queries[layer], q])
        out = []
        for query in range(q.shape[1]):
            group = q.shape[1] // k.shape[1]
            entries = self.held[layer].head(query // group)
            scores = self.model.spec.scale * entries.keys[0] @ q[0, query]
            if entries.bias is not None:
                scores = scores + entries.bias[0]
            weights = scores.softmax(-1)
            self.mass[layer][query // group, : len(weights)] += weights
            out.append(weights @ entries.values[0])
        return torch.stack(out)[None]

    def select(self) -> None:
        method = self.method
        found = method.select(
            Seen(
                make_facts(self.model, None),  # type: ignore[arg-type]
                self.prompt,
                self.tokens,
                self.held.__getitem__,
                lambda layer: self.queries[layer][-method.window :],
                self.mass.__getitem__,
                self.state,
            )
        )
        for layer, choice in enumerate(found or []):
            if isinstance(choice, Entries):
                self.held[layer] = choice
                self.mass[layer] = torch.zeros(choice.positions.shape)
                continue
            before = self.mass[layer]
            self.held[layer] = self.held[layer].take(choice)
            self.mass[layer] = torch.zeros(self.held[layer].positions.shape)
            for head, index in enumerate(choice):
                self.mass[layer][head, : len(index)] = before[head, index]

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """The greedy continuation."""
        ids, output = list(prompt), []
        self.prompt = len(prompt)
        while len(output) < count:
            for token in ids:
                at = torch.tensor([self.tokens])
                hidden = self.model.forward(torch.tensor([token]), at, self.attend)
                self.tokens += 1
            every = self.method.every
            decoded = self.tokens - self.prompt
            if decoded == 0 or (every is not None and decoded % every == 0):
                self.select()
            ids = [int(self.model.logits(hidden)[0].argmax())]
            output += ids
        return output


def requests_of(prompts: list[list[int]], output: int, samples: int = 1) -> list[EngineRequest]:
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, n=samples)
    return [EngineRequest(i, np.array(p, dtype=np.int32), params, i) for i, p in enumerate(prompts)]


def some_prompts(seed: int) -> list[list[int]]:
    """Prompts of many lengths, some with a common beginning."""
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(1, 256) for _ in range(count)]

    shared = draw(rng.choice([20, 40]))
    return [
        [*shared, *draw(5)],
        [*shared, *draw(rng.choice([1, 30]))],
        draw(rng.choice([1, 3])),
        draw(50),
    ]


@pytest.mark.parametrize("text", METHODS_SMALL)
def test_like_one_sequence_token_by_token(text: str) -> None:
    prompts = some_prompts(5)
    recipe = parse(text)
    requests = requests_of(prompts, 20, 2)
    wanted = {
        i: [Alone(Grouped(), recipe.select).generate(prompt, 20)] * 2
        for i, prompt in enumerate(prompts)
    }
    assert wanted != tokens(run(requests, model=Grouped(), pages=1000)[0])
    for chunk, extra, plain in ((512, 500, False), (7, 1, False), (64, 0, True)):
        pages = max(map(pages_needed, requests)) + extra
        found, _ = run(
            requests,
            model=Grouped(),
            recipe=recipe,
            chunk=chunk,
            pages=2 * pages,  # of twice the size
            plain=plain,
        )
        assert tokens(found) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("text", METHODS_SMALL)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([7, 64, 512]),
    windows=st.sampled_from([None, 2]),
    policy=st.sampled_from(["batch", "fcfs"]),
)
def test_memory_and_company_change_nothing(
    text: str, seed: int, chunk: int, windows: int | None, policy: str
) -> None:
    requests = random_requests(seed)
    recipe = parse(text)
    wanted = {}
    for request in requests:
        wanted.update(run([request], recipe=recipe)[0])
    pages = max(pages_needed(r) for r in requests) + 2
    found, _ = run(
        requests, recipe=recipe, pages=pages, chunk=chunk, windows=windows, policy=policy
    )
    assert tokens(found) == tokens(wanted)


@pytest.mark.parametrize(
    "name", [n for n, make in METHODS.items() if getattr(make, "axis", "") == "select"]
)
def test_a_budget_for_everything_keeps_everything(name: str) -> None:
    requests = random_requests(11)
    wanted, _ = run(requests)
    found, _ = run(requests, recipe=parse(f"{name}(budget=1000)"), chunk=64)
    assert tokens(found) == tokens(wanted)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("streaming(budget=64)", 64 + 32),
        ("h2o(budget=64)", 64 + 32),
        ("scissorhands(budget=64,tilt=0.0)", 64 + 32),
        ("snapkv(budget=64,window=8)", 64 + 16),
        ("prefixkv(budget=64)", 84 + 32),  # the longest layer
        ("elastic(budget=64)", 64 + 32),
        ("kvmerger(budget=64,eps=-1.0,recent=8,heavy=8)", 64 + 16),
        ("chelsea(budget=64)", 64 + 16),
        ("gemfilter(budget=64)", 64 + 16),
    ],
)
def test_a_selection_frees_memory(text: str, most: int) -> None:
    rng = random.Random(0)
    used = pages_by_step(requests_of([[rng.randrange(1, 256) for _ in range(400)]], 15), text)
    assert used[-1] <= -(-most // 16) + 1


def test_a_prompt_that_cuts_a_node_is_selected_all_the_same() -> None:
    """The statistics above the cut stay below it: the later sequence is computed anew."""
    rng = random.Random(1)
    long = [rng.randrange(1, 256) for _ in range(80)]
    requests = requests_of([long, [*long[:40], 7, 8, 9]], 12)
    for text in ("h2o(budget=16,every=1)", "snapkv(budget=16,window=8)"):
        recipe = parse(text)
        wanted = {r.id: run([r], recipe=recipe)[0][r.id] for r in requests}
        found, engine = run(requests, recipe=recipe, windows=1, policy="fcfs")
        assert tokens(found) == tokens(wanted)
        assert engine.world.counters.recomputed >= 40


# Shortening.


GEMS = "gemfilter(budget=20,first=2,last=4)"


def test_what_runs_is_the_shortened_prompt() -> None:
    requests = requests_of(some_prompts(2), 10, 2)
    recipe = parse(GEMS)
    assert recipe.shorten is not None
    model = MockModel()
    short = []
    for request in requests:
        layers = recipe.shorten.layers(len(model.spec.layers))
        q, keys = first_layers(model, request.prompt, layers)
        kept = recipe.shorten.shorten(q, keys)
        assert (kept is None) == (len(request.prompt) <= 20)
        prompt = request.prompt if kept is None else request.prompt[kept]
        assert prompt[:2].tolist() == request.prompt[:2].tolist()
        assert prompt[-4:].tolist() == request.prompt[-4:].tolist()
        short.append(replace(request, prompt=prompt))
    wanted, _ = run(short)
    unlike, _ = run(requests)
    for chunk in (3, 16, 512):
        found, engine = run(requests, recipe=recipe, chunk=chunk)
        assert tokens(found) == tokens(wanted)
        assert [found[r.id].prompt_tokens for r in requests] == [len(r.prompt) for r in short]
        assert engine.world.counters.prompt_computed <= sum(len(r.prompt) for r in short)
    assert tokens(unlike) != tokens(wanted)


def first_layers(model: MockModel, prompt: Any, layers: int) -> tuple[Tensor, Tensor]:
    """The last query and all keys of the last of the first ``layers``."""
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor, _rotation: None) -> Tensor:
        seen.append((q[-1], k.transpose(0, 1)))
        scores = torch.einsum("thd,sd->hts", q, k[:, 0]) * model.spec.scale
        later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return torch.einsum("hts,sd->thd", weights, v[:, 0])

    ids = torch.from_numpy(prompt.astype(np.int64))
    model.forward(ids, torch.arange(len(ids)), attend, layers=layers)
    return seen[-1]


def test_shared_beginnings_are_read_once() -> None:
    rng = random.Random(3)
    shared = [rng.randrange(1, 256) for _ in range(100)]
    requests = requests_of([[*shared, 10 + i, 20 + i] for i in range(5)], 1)
    model = MockModel()
    run(requests, recipe=parse(GEMS), model=model)
    assert model.tokens_seen <= 100 + 5 * 2 + 5 * 20


def test_prompts_that_are_scored_stay_whole() -> None:
    (request,) = requests_of([list(range(1, 61))], 4)
    request = replace(request, params=replace(request.params, prompt_logprobs=0))
    found, _ = run([request], recipe=parse(GEMS))
    wanted, _ = run([request])
    assert tokens(found) == tokens(wanted)
    assert len(found[0].prompt_logprobs or []) == 59


# What is refused.


def test_layers_with_a_window() -> None:
    recipe = parse("snapkv")
    with pytest.raises(InvalidRequestError, match="last 9 tokens only"):
        run([], model=MockModel(spec(window=9)), recipe=recipe)
    run([], model=MockModel(spec(window=512)), recipe=recipe)
    run([], model=MockModel(spec(window=9)), recipe=parse("kivi"))


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(InvalidRequestError, match="has 2 layers"):
        run([], recipe=parse("gemfilter(layer=2)"))


# Real models.


@pytest.mark.slow
@pytest.mark.parametrize("text", [*METHODS_SMALL, GEMS])
def test_the_demonstration_model(text: str) -> None:
    story = "It was a dark and stormy night, and the old man sat by the fire. " * 3
    prompts = [story + end for end in ("Then", "The dog barked and", "She said that")]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=2)
    outputs = []
    for chunk, memory in ((512, "64MiB"), (33, "1MiB")):
        with LLM("demo", kv=text, kv_memory=memory, chunk=chunk, dtype="float32") as llm:
            outputs.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
    assert outputs[0] == outputs[1]
    assert all(len(ids) == 12 for ids in outputs[0])
