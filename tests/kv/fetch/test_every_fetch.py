"""What must hold for every fetch that looks for single tokens, sentences or clusters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from clustered import SHAPES, Node, asked, chosen, readers
from test_quantised import with_texts

from quire.kv.method import Asked
from quire.kv.recipes import parse
from toy import make_facts

SMALL = [
    "squeezed(window=8,centroids=0.3)",
    "squeezed(window=8,levels=2,top=0.1)",
    "sentencekv(budget=24,longest=9)",
    "a2ats(keep=0.1,sinks=2,recent=9,distance=100)",
    "sparf(budget=0.1,channels=3,page=5,recent=7)",
]


def node_of(n: int, heads: int = 4, kv_heads: int = 2) -> Node:
    facts = with_texts(make_facts(heads, kv_heads, head_dim=16), tokens=60)
    facts = replace(facts, sentence_ends=lambda: torch.arange(20) == 1)
    return Node(facts, n, start=3)


@pytest.mark.parametrize("text", SMALL)
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("n", [1, 17, 61, 128])
def test_places_are_of_the_node_and_none_is_there_twice(
    text: str, heads: int, kv_heads: int, n: int
) -> None:
    node = node_of(n, heads, kv_heads)
    tokens = np.random.default_rng(n).integers(0, 9, n + 3).astype(np.int32)
    method = parse(text).fetch
    index = node.maybe(method, tokens)
    if index is None:
        assert n < 128
        return
    rows = 5
    q = node.rows(1, rows)
    for given in (q, 1e4 * q, torch.zeros_like(q), torch.full_like(q, torch.nan)):
        found = asked(method, index, 1, given, readers(rows))
        assert found.chunks.shape[:2] == (rows, kv_heads)
        assert found.chunks.is_contiguous()
        assert int(found.chunks.min()) >= 0
        assert int(found.chunks.max()) < n
        for row in chosen(found):
            for one in row:
                assert one == sorted(one)
                assert n - 1 in one  # the newest is always read


@pytest.mark.parametrize("text", SMALL)
def test_rows_do_not_depend_on_each_other(text: str) -> None:
    node = node_of(128)
    tokens = np.random.default_rng(0).integers(0, 9, 131).astype(np.int32)
    method = parse(text).fetch
    index = node.index(method, tokens)
    q = node.rows(0, 4)
    together = chosen(asked(method, index, 0, q, readers(4)))
    alone = [chosen(asked(method, index, 0, row[None], readers(1)))[0] for row in q]
    assert together == alone


@pytest.mark.parametrize("text", [*SMALL, "landmarks(budget=32,chunk=4,outliers=2,local=1)"])
def test_several_nodes_at_once(text: str) -> None:
    """As if each had been asked alone; rows that ask nothing do not matter."""
    tokens = np.random.default_rng(0).integers(0, 9, 300).astype(np.int32)
    method = parse(text).fetch
    assert method is not None
    nodes = [node_of(n) for n in (128, 203)]
    indexes = [node.index(method, tokens[: node.n + 3]) for node in nodes]
    questions = [Asked(1, 3, indexes[0], 128), Asked(4, 2, indexes[1], 203)]
    questions.append(Asked(2, 1, indexes[1], 203))
    q = nodes[0].rows(1, 7)
    together = method.choose(1, q, readers(7), questions)
    assert len(together) == 3
    for question, found in zip(questions, together, strict=True):
        (alone,) = method.choose(1, q, readers(7), [question])
        assert found.size == alone.size
        assert torch.equal(found.chunks, alone.chunks)
        assert (found.mask is None) == (alone.mask is None)
        assert found.mask is None or torch.equal(found.mask, alone.mask)
    assert method.choose(1, q, readers(7), []) == []
