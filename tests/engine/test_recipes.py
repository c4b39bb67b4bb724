"""KV recipes in the engine: what must hold for every method, on a mock model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import pages_needed, random_requests, run, tokens
from torch import Tensor

from quire.decode.params import SamplingParams
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest, EngineResult
from quire.errors import InvalidRequestError
from quire.kv.method import Asked, Chosen, Entries, Facts, Plain, Reader, Recipe, Seen
from quire.kv.recipes import parse
from quire.kv.select.h2o import HeavyHitters
from quire.kv.select.kvmerger import SimilarRuns
from toy import MockModel, spec


@dataclass(frozen=True)
class Kept(Plain):
    """Says that it takes less than entries do, so that it is taken."""

    @property
    def nbytes(self) -> int:
        return super().nbytes // 2


@dataclass(frozen=True)
class KeepAll:
    """Stores entries as they are."""

    block: int = 16
    recent: int = 0

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Plain:
        assert len(layers) == facts.layers
        assert all(len(entries) % self.block == 0 for entries in layers)
        return Kept(tuple(layers))


@dataclass(frozen=True)
class WeighAll(KeepAll):
    """The same, and what its entries have received."""

    def pack_weighed(
        self, facts: Facts, layers: Sequence[Entries], mass: Sequence[Tensor] | None
    ) -> Plain:
        if mass is not None:
            assert [m.shape for m in mass] == [e.positions.shape for e in layers]
            assert all(bool((m > 0).all()) for m in mass)  # of its own query at least
        return self.pack(facts, layers)


@dataclass(frozen=True)
class SelectAll:
    """Takes every entry, as a view of its own; ``merged``: as entries with a bias of zero."""

    every: int | None = None
    merged: bool = False
    window: int = 3
    mass: bool = True

    @property
    def online(self) -> bool:
        return self.every is not None

    def select(self, seen: Seen) -> list[list[Tensor]] | list[Entries]:
        layers = range(seen.facts.layers)
        for layer in layers:
            entries = seen.entries(layer)
            assert len(entries) == seen.tokens
            assert entries.positions.tolist() == [list(range(seen.tokens))] * len(entries.keys)
            if self.window:
                assert len(seen.queries(layer)) == min(3, seen.tokens)
            if self.mass:
                received = seen.mass(layer).sum().item()
                assert received == pytest.approx(seen.tokens * seen.facts.heads, rel=1e-4)
        if self.merged:
            return [
                replace(e, bias=torch.zeros(e.positions.shape))
                for e in (seen.entries(layer) for layer in layers)
            ]
        every = torch.arange(seen.tokens)
        return [[every] * seen.facts.kv_heads for _ in layers]


@dataclass(frozen=True)
class FetchAll:
    """Chooses every entry, in a strange order."""

    window: int = 3

    def index(self, facts: Facts, layers: Any, tokens: Any, queries: Any) -> FetchAll.All:
        entries = layers(0)
        assert len(tokens) > int(entries.positions.max())
        assert queries(facts.layers - 1).shape[1:] == (facts.heads, facts.head_dim)
        assert len(queries(0)) <= 3
        return self.All(len(layers(facts.layers - 1)), facts.kv_heads)

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader], asked: Sequence[Asked]
    ) -> list[Chosen]:
        assert len(readers) == len(q)
        found = []
        for a in asked:
            assert a.entries == a.index.entries
            places = torch.arange(a.entries + 2).flip(0).clamp(max=a.entries - 1)
            mask = torch.arange(a.entries + 2).flip(0) < a.entries
            shape = (a.rows, a.index.kv_heads, -1)
            given = (x.expand(shape).contiguous() for x in (places, mask))
            found.append(Chosen(next(given), mask=next(given)))
        return found

    @dataclass(frozen=True)
    class All:
        entries: int
        kv_heads: int
        nbytes: ClassVar[int] = 0


@dataclass(frozen=True)
class ChooseAll:
    """A sparse prefill that reads every place, backwards."""

    block: int = 4
    least: int = 0
    tail: int = 0

    def choose(
        self, facts: Facts, layer: int, q: Tensor, entries: Entries, start: int
    ) -> list[list[Tensor]]:
        assert len(q) >= self.block
        assert len(entries) == start + len(q)
        assert start + len(q) > self.least
        assert entries.positions.tolist() == [list(range(len(entries)))] * facts.kv_heads
        starts = range(start, start + len(q), self.block)
        return [[torch.arange(s).flip(0)] * facts.kv_heads for s in starts]


EXACT = {
    "store": Recipe(store=KeepAll()),
    "store, the newest kept": Recipe(store=KeepAll(32, 16)),
    "store, weighed": Recipe(store=WeighAll(4)),
    "select": Recipe(select=SelectAll()),
    "select while decoding": Recipe(select=SelectAll(every=4)),
    "merge": Recipe(select=SelectAll(merged=True, mass=False)),
    "fetch": Recipe(fetch=FetchAll()),
    "store and fetch": Recipe(store=KeepAll(), fetch=FetchAll()),
    "select and store": Recipe(select=SelectAll(), store=KeepAll()),
    "select and store, weighed": Recipe(select=SelectAll(), store=WeighAll(4)),
    "sparse": Recipe(sparse=ChooseAll()),
    "sparse, but for ends": Recipe(sparse=ChooseAll(3, 10, 5)),
    "sparse, over stored entries": Recipe(sparse=ChooseAll(5, 0, 2), store=KeepAll()),
    "sparse, then select": Recipe(sparse=ChooseAll(8, 3, 1), select=SelectAll()),
}


def run_recipe(
    requests: list[EngineRequest], recipe: Recipe, **options: Any
) -> tuple[dict[int, EngineResult], Engine]:
    return run(requests, recipe=recipe, **options)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(EXACT)),
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(["batch", "fcfs"]),
    extra=st.sampled_from([0, 1, 3, 50]),
    chunk=st.sampled_from([1, 3, 16, 64, 512]),
    windows=st.sampled_from([None, 2]),
    plain=st.booleans(),
)
def test_methods_that_lose_nothing_change_nothing(
    name: str, seed: int, policy: str, extra: int, chunk: int, windows: int | None, plain: bool
) -> None:
    requests = random_requests(seed)
    pages = max(pages_needed(r) for r in requests) + extra
    wanted, _ = run(requests)
    found, _ = run_recipe(
        requests,
        EXACT[name],
        policy=policy,
        pages=pages,
        chunk=chunk,
        windows=windows,
        plain=plain,
    )
    assert tokens(found) == tokens(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["streaming(budget=16,sinks=2)", "snapkv(budget=24,window=8)"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.sampled_from([7, 64, 512]))
def test_selections_do_not_depend_on_memory_or_company(text: str, seed: int, chunk: int) -> None:
    requests = random_requests(seed)
    recipe = parse(text)
    wanted = {}
    for request in requests:
        wanted.update(run_recipe([request], recipe)[0])
    pages = max(pages_needed(r) for r in requests) + 2
    found, _ = run_recipe(requests, recipe, pages=pages, chunk=chunk)
    assert tokens(found) == tokens(wanted)


@pytest.mark.parametrize(("chunk", "end"), [(24, 48), (512, 50)])
def test_only_what_is_chosen_is_read(chunk: int, end: int) -> None:
    """A prompt whose blocks read nothing before them, but for its last tokens."""

    @dataclass(frozen=True)
    class ChooseNothing(ChooseAll):
        def choose(self, *given: Any) -> list[list[Tensor]]:
            return [[places[0][:0]] for places in super().choose(*given)]

    recipe = Recipe(sparse=ChooseNothing(block=8, least=20, tail=6))
    request = long_request(0, 56, 6)
    request = replace(request, params=replace(request.params, prompt_logprobs=0))
    wanted, _ = run([request], plain=True, model=Blind(8, end))
    found, _ = run_recipe([request], recipe, chunk=chunk)
    everything, _ = run([request])
    assert tokens(found) == tokens(wanted)
    assert scores(found) == pytest.approx(scores(wanted), rel=1e-4)
    assert scores(found) != pytest.approx(scores(everything), rel=1e-2)


def scores(found: dict[int, EngineResult]) -> list[float]:
    return [entry.logprob for entry in found[0].prompt_logprobs or []]


class Blind(MockModel):
    """Tokens before ``end`` see the ``block`` that they are in alone."""

    def __init__(self, block: int, end: int) -> None:
        super().__init__()
        self.block, self.end = block, end
        self.held: list[tuple[Tensor, Tensor]] = []

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Any,
        *,
        layers: int | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        def seeing(layer: int, q: Tensor, k: Tensor, v: Tensor, _rotation: None) -> Tensor:
            attend(layer, q, k, v, None)
            if layer == len(self.held):
                self.held.append((k[:0], v[:0]))
            keys, values = (torch.cat(x) for x in zip(self.held[layer], (k, v), strict=True))
            self.held[layer] = keys, values
            out = []
            for row, at in zip(q, positions.tolist(), strict=True):
                first = at // self.block * self.block if at < self.end else 0
                weights = (self.spec.scale * row @ keys[first : at + 1, 0].T).softmax(-1)
                out.append(weights @ values[first : at + 1, 0])
            whole = torch.stack(out)
            last = layer == len(self.spec.layers) - 1
            return whole if rows is None or not last else whole[rows]

        return super().forward(ids, positions, seeing, layers=layers, rows=rows)


def test_layers_with_a_window_read_everything() -> None:
    class ChooseNever(ChooseAll):
        def choose(self, *given: Any) -> list[list[Tensor]]:
            raise AssertionError

    requests = [long_request(0, 60, 5)]
    wanted, _ = run(requests, model=MockModel(spec(window=9)))
    recipe = Recipe(sparse=ChooseNever())
    found, _ = run_recipe(requests, recipe, model=MockModel(spec(window=9)))
    assert tokens(found) == tokens(wanted)
    with pytest.raises(AssertionError):
        run_recipe(requests, recipe)


def long_request(index: int, prompt: int, output: int, seed: int = 0) -> EngineRequest:
    rng = random.Random(seed)
    ids = np.array([rng.randrange(1, 256) for _ in range(prompt)], dtype=np.int32)
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    return EngineRequest(index, ids, params, index)


def test_shared_nodes_are_packed_once() -> None:
    packed: list[int] = []

    @dataclass(frozen=True)
    class Counting(KeepAll):
        def pack(self, facts: Facts, layers: Sequence[Entries]) -> Plain:
            packed.append(len(layers[0]))
            return super().pack(facts, layers)

    shared = long_request(0, 160, 4)
    requests = [
        EngineRequest(i, np.append(shared.prompt, [i + 1] * 32).astype(np.int32), shared.params, i)
        for i in range(3)
    ]
    run_recipe(requests, Recipe(store=Counting()))
    assert sorted(packed) == [32, 32, 32, 160]


def test_what_saves_nothing_is_not_packed_again() -> None:
    tried: list[int] = []

    @dataclass(frozen=True)
    class Growing(KeepAll):
        def pack(self, facts: Facts, layers: Sequence[Entries]) -> Plain:
            tried.append(len(layers[0]))
            return Plain((*layers, *layers))

    request = long_request(0, 160, 40)
    wanted, _ = run([request])
    found, _ = run_recipe([request], Recipe(store=Growing()))
    assert tokens(found) == tokens(wanted)
    assert tried == [160, 16, 32]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("kivy(bits=2)", "kivi"),
        ("kivi(bit=2)", "bits"),
        ("kivi(bits=two)", "int"),
        ("kivi+kivi", "store"),
        ("snapkv+streaming", "select"),
        ("streaming+landmarks", "stale"),
        ("h2o+kivi", "lose a little more"),
        ("kvmerger(value_mass=false,mass_bias=true)+kivi", "bias"),
        ("h2o(budget=half)", "int or float"),
        ("h2o(budget=true)", "int or float"),
        ("h2o(budget=1.5)", "share"),
        ("h2o(every=2.0)", "int or none"),
        ("h2o(fair=1)", "bool"),
        ("snapkv(", "cannot be read"),
        ("snapkv+", "Write a recipe like"),
        ("SnapKV", "Do you mean snapkv"),
        ("kivy", "Do you mean kivi"),
        ("snapkv(1024)", "'1024' in snapkv has no name"),
        ("kivi(bits=2,bits=4)", "bits twice"),
        ("snapkv(budget=25%)", "such as 0.25"),
        ("snapkv(budget=64)+kivi(bits=3)", "kivi: bits=3"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        parse(text)


def test_composition() -> None:
    recipe = parse(" snapkv(budget=1024, pool=avg) + kivi(bits=4)+landmarks ")
    assert recipe.select is not None
    assert recipe.store is not None
    assert recipe.fetch is not None
    h2o = parse("h2o(budget=0.25,recent=8,fair=true,every=none)+kivi").select
    assert h2o == HeavyHitters(0.25, 8, True, None)
    assert parse("kvmerger(eps=-1,budget=64)").select == SimilarRuns(64, -1.0)
    assert parse("none").plain
    assert parse("").plain
