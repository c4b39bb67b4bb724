from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kv.pages import PagePool
from quire.kv.tree import Node, PrefixTree
from quire.schedule.groups import HEAD, largest_groups
from quire.schedule.planner import computed_tokens, decide_segments

PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=9)
WINDOWS = st.lists(st.lists(PROMPT, min_size=1, max_size=9), min_size=1, max_size=3)


def plant(tree: PrefixTree, prompts: list[list[int]], cost: int) -> list[Node]:
    leaves = []
    for prompt in prompts:
        leaf = tree.insert(np.array(prompt, dtype=np.int32))
        tree.retain(leaf)
        leaves.append(leaf)
    decide_segments(tree.root, cost)
    return leaves


def key(prefix: list[int]) -> bytes:
    return hashlib.blake2b(np.array(prefix, dtype=np.int32).tobytes(), digest_size=16).digest()


@settings(max_examples=200, deadline=None)
@given(prompts=st.lists(PROMPT, min_size=1, max_size=12), cost=st.integers(0, 5))
def test_groups_are_the_shared_prefixes(prompts: list[list[int]], cost: int) -> None:
    tree = PrefixTree(PagePool(0, 16))
    found = largest_groups(plant(tree, prompts, cost), 10**6)
    prefixes = {key(p[:n]): p[:n] for p in prompts for n in range(1, len(p) + 1)}
    assert len({g.key for g in found}) == len(found)
    for group in found:
        prefix = prefixes[group.key]
        assert group.end == len(prefix)
        assert group.head == tuple(prefix[group.start :])[:HEAD]
        assert group.readers == sum(p[: group.end] == prefix for p in prompts)
        assert group.saved == (group.readers - 1) * (group.end - group.start)
        assert group.older == 0
    assert [g.saved for g in found] == sorted((g.saved for g in found), reverse=True)


@settings(max_examples=200, deadline=None)
@given(windows=WINDOWS, cost=st.integers(0, 5))
def test_savings_add_up_over_windows(windows: list[list[list[int]]], cost: int) -> None:
    tree = PrefixTree(PagePool(0, 16))
    saved = 0
    for prompts in windows:
        leaves = plant(tree, prompts, cost)
        saved += sum(g.saved for g in largest_groups(leaves, 10**6))
    asked = sum(len(p) for prompts in windows for p in prompts)
    assert saved == asked - computed_tokens(tree.root)


def test_only_the_largest() -> None:
    tree = PrefixTree(PagePool(0, 16))
    prompts = [[group] * 20 + [own] for group in range(5) for own in range(group + 2)]
    leaves = plant(tree, prompts, 16)
    found = largest_groups(leaves, 2)
    assert [(g.head[0], g.readers, g.saved) for g in found] == [(4, 6, 100), (3, 5, 80)]
    assert largest_groups(leaves, 0) == largest_groups([], 2) == []


def test_older_readers_paid_already() -> None:
    tree = PrefixTree(PagePool(0, 16))
    plant(tree, [[7] * 30 + [1]], 16)
    (group,) = largest_groups(plant(tree, [[7] * 30 + [2]], 16), 9)
    assert (group.readers, group.older, group.saved) == (1, 1, 30)
