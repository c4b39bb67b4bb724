"""Cutting: every request in one part, no part too large, duplicates where they are said to be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.decode.params import SamplingParams
from quire.engine.request import EngineRequest
from quire.fleet.cut import PRECISION, SLACK, cut, split
from quire.fleet.share import Costs, Share, in_order
from quire.kv.pages import PagePool
from quire.kv.tree import PrefixTree
from quire.schedule.planner import distinct_tokens
from tests.toy import spec

SEEDS = st.integers(0, 10**6)
COSTS = Costs(attention=0.01, context=500, output=0.5)


def random_requests(seed: int, most: int = 12) -> list[EngineRequest]:
    """Prompts that share prefixes on several levels, some equal, some that share with nobody."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    requests = []
    for index in range(rng.randrange(most + 1)):
        prompt = []
        if prompts and rng.random() < 0.8:
            known = rng.choice(prompts)
            prompt = known[: rng.randrange(1, len(known) + 1)]
        prompt = prompt + [rng.randrange(300) for _ in range(rng.choice([0, 1, 7, 40]))]
        prompts.append(prompt[:200] or [1])
        params = SamplingParams(
            n=rng.choice([1, 1, 4]),
            max_tokens=rng.choice([1, 30, None]),
            prompt_logprobs=rng.choice([None, None, None, 0]),
        )
        requests.append(EngineRequest(index, np.array(prompts[-1], dtype=np.int32), params, 0))
    return requests


def computed(requests: Sequence[EngineRequest]) -> int:
    """Prompt tokens that one engine computes for these requests."""
    tree = PrefixTree(PagePool(0, 16))
    for request in requests:
        tree.retain(tree.insert(request.prompt, shared=request.params.prompt_logprobs is None))
    return distinct_tokens(tree)


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_any_run_of_neighbours_costs_what_its_tree_costs(seed: int) -> None:
    requests = in_order(random_requests(seed))
    only_prompts = Costs(output=0.0)
    share = Share.make(requests, only_prompts)
    outputs = [r.params.n for r in requests]  # one token a sample
    for start in range(len(requests) + 1):
        for end in range(start, len(requests) + 1):
            expected = computed(requests[start:end]) + sum(outputs[start:end])
            assert share.cost(start, end) == pytest.approx(expected)


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, loads=st.lists(st.sampled_from([0.0, 0.0, 50.0, 400.0]), min_size=1, max_size=4))
def test_parts_hold_every_request_once_and_are_as_small_as_can_be(
    seed: int, loads: list[float]
) -> None:
    requests = in_order(random_requests(seed, most=8))
    share = Share.make(requests, COSTS)
    parts = cut(share, loads)
    assert [i for part in parts for i in part] == list(range(len(requests)))
    assert len(parts) == len(loads)

    def largest(ends: Sequence[int]) -> float:
        runs = zip(pairwise((0, *ends, len(requests))), loads, strict=True)
        return max((load + share.cost(a, b) for (a, b), load in runs if b > a), default=0.0)

    best = min(
        largest(ends)
        for ends in combinations_with_replacement(range(len(requests) + 1), len(loads) - 1)
    )
    assert largest([part.stop for part in parts[:-1]]) <= best * (1 + SLACK) * (1 + 2 * PRECISION)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, workers=st.integers(1, 6))
def test_duplicates_are_the_prefixes_at_the_cuts(seed: int, workers: int) -> None:
    requests = in_order(random_requests(seed))
    share = Share.make(requests, COSTS)
    parts = [part for part in cut(share, [0.0] * workers) if part]
    twice = sum(int(share.common[part.start]) for part in parts)
    apart = sum(computed([requests[i] for i in part]) for part in parts)
    assert apart == computed(requests) + twice


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, keep=st.sampled_from([0.0, 30.0, 1000.0]), other=st.sampled_from([0.0, 100.0]))
def test_a_move_makes_the_end_sooner(seed: int, keep: float, other: float) -> None:
    requests = in_order(random_requests(seed))
    share = Share.make(requests, COSTS)
    place, whole = split(share, keep, other), len(requests)

    def end(at: int) -> float:
        return max(keep + share.cost(0, at), other + share.cost(at, whole))

    if place < whole:
        assert end(place) == pytest.approx(min(map(end, range(whole + 1))))
        assert end(place) < (1 - SLACK) * (keep + share.cost(0, whole))
    else:
        stay = keep + share.cost(0, whole)
        assert all(end(at) >= (1 - SLACK) * stay - 1e-6 for at in range(whole))


def groups(sizes: Sequence[int], prefix: int = 1000, own: int = 20) -> list[EngineRequest]:
    """Documents with so many questions each."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=10)
    prompts = []
    for size in sizes:
        head = rng.integers(0, 30000, prefix)
        prompts += [np.concatenate([head, rng.integers(0, 30000, own)]) for _ in range(size)]
    found = [EngineRequest(i, p.astype(np.int32), params, 0) for i, p in enumerate(prompts)]
    return in_order(found)


def test_cuts_fall_between_documents() -> None:
    share = Share.make(groups([10] * 8), Costs())
    parts = cut(share, [0.0] * 4)
    assert [len(part) for part in parts] == [20] * 4
    assert not any(share.common[part.start] for part in parts)


def test_a_document_too_large_is_cut_among_its_questions() -> None:
    share = Share.make(groups([200], prefix=100), Costs())
    parts = cut(share, [0.0] * 4)
    assert [len(part) for part in parts] == [50] * 4
    assert [int(share.common[part.start]) for part in parts] == [0, 100, 100, 100]


def test_a_prefix_that_outweighs_its_readers_stays_whole() -> None:
    share = Share.make(groups([8, 1], prefix=5000), Costs())
    assert sorted(len(part) for part in cut(share, [0.0] * 4)) == [0, 0, 1, 8]


def test_those_who_have_work_get_less() -> None:
    share = Share.make(groups([1] * 60, prefix=10), Costs())
    assert [len(part) for part in cut(share, [0.0, 1200.0])] == [45, 15]


def test_costs_follow_the_model() -> None:
    toy = spec(layers=2)
    weights = toy.hidden_size * (2 * (2 + 1) * 8 + 3 * toy.intermediate_size)
    assert Costs.of(toy).attention == pytest.approx(2 * 2 * 8 / weights)
    assert Costs.of(spec(window=9)).attention == 0.0
    costs = Costs(attention=0.5)
    assert costs.span(3, 6) == pytest.approx(3 + 0.5 * (3 + 4 + 5 + 1.5))
