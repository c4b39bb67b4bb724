from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kv.pages import PagePool
from quire.kv.tree import Node, PrefixTree

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=16)


def tokens(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def spelled(node: Node) -> list[int]:
    """All tokens from the top to the end of ``node``."""
    parts: list[list[int]] = []
    at: Node | None = node
    while at is not None:
        parts.append(at.tokens.tolist())
        at = at.parent
    return [t for part in reversed(parts) for t in part]


def common(a: list[int], b: list[int]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


@settings(max_examples=300, deadline=None)
@given(prompts=PROMPTS, probe=st.lists(st.integers(0, 3), max_size=14))
def test_tree_equals_brute_force_matching(prompts: list[list[int]], probe: list[int]) -> None:
    tree = PrefixTree(PagePool(0, 16))
    for prompt in prompts:
        leaf = tree.insert(tokens(prompt))
        assert spelled(leaf) == prompt
    node, matched = tree.match(tokens(probe))
    assert matched == max(common(probe, prompt) for prompt in prompts)
    assert node.start <= matched <= node.end
    prefixes = {tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)}
    assert sum(len(n.tokens) for n in tree.nodes()) == len(prefixes)
    for node in tree.nodes():
        assert len({int(c.tokens[0]) for c in node.children.values()}) == len(node.children)


@settings(max_examples=200, deadline=None)
@given(prompts=PROMPTS)
def test_released_tree_is_empty(prompts: list[list[int]]) -> None:
    tree = PrefixTree(PagePool(0, 16))
    leaves = []
    for prompt in prompts:
        leaf = tree.insert(tokens(prompt))
        tree.retain(leaf)
        leaves.append(leaf)
    for leaf in leaves:
        tree.release(leaf)
        tree.prune(leaf) if not leaf.readers and not leaf.branches else None
    assert all(node.readers == 0 for node in tree.nodes())


@settings(max_examples=200, deadline=None)
@given(prompts=PROMPTS, folds=st.lists(st.booleans(), max_size=40), size=st.integers(1, 4))
def test_splitting_keeps_kv(prompts: list[list[int]], folds: list[bool], size: int) -> None:
    """Nodes that hold KV keep it, token for token, when later prompts split them."""
    pool = PagePool(400, size)
    tree = PrefixTree(pool)
    for number, prompt in enumerate(prompts):
        leaf = tree.insert(tokens(prompt))
        if leaf.folded is None:
            leaf.folded = False
        for node in leaf.path():
            if node.folded is None:
                node.folded = bool(node.branches) and number < len(folds) and folds[number]
        before = {
            id(n): (spelled(n)[n.kv_start : n.kv_start + n.computed], n) for n in tree.nodes()
        }
        assert all(len(text) == n.computed for text, n in before.values())
        for node in leaf.path():
            if not node.folded and node.missing:
                owed = node.owed(node.missing).tolist()
                assert owed == spelled(node)[node.kv_start + node.computed : node.end]
                tree.append(node, node.missing)
        pool.check([n.segment for n in tree.resident.values() if n.segment])
        for node in tree.nodes():
            below = [n for n in tree.nodes() if n.segment and n is not node and node in ups(n)]
            assert node.holders == len(below)


def ups(node: Node) -> list[Node]:
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def test_unshared_prompt_matches_nobody() -> None:
    tree = PrefixTree(PagePool(0, 16))
    alone = tree.insert(tokens([1, 2, 3]), shared=False)
    other = tree.insert(tokens([1, 2, 3]))
    assert alone is not other
    assert alone.loose_leaf
    assert not other.loose_leaf
