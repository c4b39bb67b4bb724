from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kv.pages import PagePool
from quire.kv.tree import Node, PrefixTree
from quire.schedule.planner import (
    computed_tokens,
    decide_segments,
    depth_first,
    distinct_tokens,
    one_level_saving,
)
from quire.schedule.state import Sequence

PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=9)


def planted(prompts: list[list[int]]) -> tuple[PrefixTree, list[Sequence]]:
    tree = PrefixTree(PagePool(0, 16))
    sequences = []
    for index, prompt in enumerate(prompts):
        ids = np.array(prompt, dtype=np.int32)
        leaf = tree.insert(ids)
        tree.retain(leaf)
        sequences.append(Sequence(index, index, 0, ids, leaf, 1 + index % 5))
    return tree, sequences


def brute_force(root: Node, cost: int) -> int:
    """Least tokens + cost over every choice of folded nodes."""
    nodes = []
    stack = root.branches
    while stack:
        node = stack.pop()
        nodes.append(node)
        stack.extend(node.branches)
    free = [n for n in nodes if n.branches and not n.ends]
    best = None
    for choice in product([False, True], repeat=len(free)):
        for node in nodes:
            node.folded = False
        for node, fold in zip(free, choice, strict=True):
            node.folded = fold
        kept = sum(bool(n.branches) and not n.folded for n in nodes)
        total = computed_tokens(root) + cost * kept
        best = total if best is None else min(best, total)
    for node in nodes:
        node.folded = None
    return best or 0


@settings(max_examples=150, deadline=None)
@given(prompts=PROMPTS, cost=st.integers(0, 9))
def test_segments_are_the_cheapest(prompts: list[list[int]], cost: int) -> None:
    tree, _ = planted(prompts)
    expected = brute_force(tree.root, cost)
    decide_segments(tree.root, cost)
    kept = sum(bool(n.branches) and not n.folded for n in tree.nodes())
    assert computed_tokens(tree.root) + cost * kept == expected


@settings(max_examples=200, deadline=None)
@given(prompts=PROMPTS)
def test_saving_equals_the_oracle_and_never_exceeds_it(prompts: list[list[int]]) -> None:
    tree, _ = planted(prompts)
    oracle = len({tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)})
    decide_segments(tree.root, cost=0)
    assert computed_tokens(tree.root) == oracle == distinct_tokens(tree)
    costly, _ = planted(prompts)
    decide_segments(costly.root)
    assert computed_tokens(costly.root) >= oracle


def one_level_brute_force(prompts: list[list[int]]) -> int:
    """Most that groups of prompts with one common prefix each can save."""

    @cache
    def best(group: frozenset[int]) -> int:
        if not group:
            return 0
        first = min(group)
        found = best(group - {first})
        for length in range(1, len(prompts[first]) + 1):
            prefix = prompts[first][:length]
            others = [i for i in group - {first} if prompts[i][:length] == prefix]
            for chosen in product([False, True], repeat=len(others)):
                members = {first, *(i for i, c in zip(others, chosen, strict=True) if c)}
                found = max(found, (len(members) - 1) * length + best(group - members))
        return found

    return best(frozenset(range(len(prompts))))


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=6)
)
def test_one_level_oracle(prompts: list[list[int]]) -> None:
    tree, _ = planted(prompts)
    assert one_level_saving(tree.root) == one_level_brute_force(prompts)


@settings(max_examples=150, deadline=None)
@given(prompts=PROMPTS)
def test_order_is_depth_first_and_complete(prompts: list[list[int]]) -> None:
    tree, sequences = planted(prompts)
    decide_segments(tree.root)
    ordered = depth_first(tree.root, sequences)
    assert sorted(s.id for s in ordered) == list(range(len(prompts)))
    for node in tree.nodes():
        at = [i for i, s in enumerate(ordered) if node in chain(s.leaf)]
        assert at == list(range(at[0], at[0] + len(at)))


def chain(node: Node) -> list[Node]:
    found = [node]
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def test_decode_heavy_groups_first() -> None:
    tree, sequences = planted([[0, 0, 0, 0], [0, 0, 0, 1], [1, 1], [1, 0]])
    for seq, output in zip(sequences, (1, 1, 50, 50), strict=True):
        seq.max_new = output
    decide_segments(tree.root)
    assert {s.id for s in depth_first(tree.root, sequences)[:2]} == {2, 3}


def test_short_spans_are_folded() -> None:
    tree, _ = planted([[1, 2, *range(100, 140)], [1, 2, *range(200, 240)]])
    decide_segments(tree.root)
    (node,) = tree.root.branches
    assert node.folded
    assert [child.kv_start for child in node.branches] == [0, 0]


@pytest.mark.slow
def test_a_deep_chain_needs_no_recursion() -> None:
    tree, sequences = planted([[1] * n for n in range(1, 1500)])
    decide_segments(tree.root)
    assert len(depth_first(tree.root, sequences)) == 1499
    assert one_level_saving(tree.root) > 0
