"""SentenceKV against the algorithm in loops, the running mean, and what it finds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from clustered import SHAPES, Node, at_random, chosen, mass, readers
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kv.fetch.sentences import SentenceBuckets, Sentences, sentence_numbers
from quire.kv.method import Facts, Reader
from toy import make_facts

SMALL = SentenceBuckets(budget=80, sinks=8, recent=12, longest=16)
END, WORD = 1, 7


def with_ends(facts: Facts) -> Facts:
    return replace(facts, sentence_ends=lambda: torch.arange(20) == END)


def some_tokens(node: Node) -> np.ndarray:
    """A sentence ends where the topic changes."""
    tokens = np.full(node.start + node.n, WORD, dtype=np.int32)
    changes = (node.topic[1:] != node.topic[:-1]).nonzero().flatten().numpy()
    tokens[node.start + changes] = END
    return tokens


def made(
    n: int, heads: int = 4, kv_heads: int = 2, method: SentenceBuckets = SMALL, **more: object
) -> tuple[Node, Sentences]:
    facts = with_ends(make_facts(heads, kv_heads, **more))  # type: ignore[arg-type]
    node = Node(facts, n, topics=20)
    index = node.index(method, some_tokens(node))
    assert isinstance(index, Sentences)
    return node, index


def sentences_of(tokens: list[int], longest: int) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for place, token in enumerate(tokens):
        found[-1].append(place)
        if token == END or len(found[-1]) == longest:
            found.append([])
    return [one for one in found if one]


def wanted(
    node: Node, layer: int, mean: Tensor, head: int, tokens: np.ndarray, method: SentenceBuckets
) -> set[int]:
    """What a mean query ``[head_dim]`` reads."""
    n = node.n
    keys = node.entries[layer].keys[head].double()
    always = set(range(max(0, method.sinks - node.start))) | set(range(n - method.recent, n))
    sentences = sentences_of(tokens[node.start :].tolist(), method.longest)
    score = [float(mean @ keys[one].mean(0)) for one in sentences]
    read = set(always)
    for index in sorted(range(len(score)), key=lambda i: -score[i]):
        for token in sentences[index]:
            if token not in always and len(read) < method.budget:
                read.add(token)
    return read


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("start", [0, 5, 100])
def test_against_the_algorithm(heads: int, kv_heads: int, start: int) -> None:
    """Token by token: the mean is over the current sentence of the output."""
    node = Node(with_ends(make_facts(heads, kv_heads)), 307, start=start)
    tokens = some_tokens(node)
    index = node.index(SMALL, tokens)
    states: list[dict[object, object]] = [{}, {}]
    since = [[], []]  # type: list[list[Tensor]]
    for written in ([WORD, WORD], [WORD, END], [END, WORD], [WORD, WORD]):
        q = node.rows(1, 2)
        rows = [Reader(token, 500, state) for token, state in zip(written, states, strict=True)]
        found = chosen(index.choose(1, q, rows))
        for row in range(2):
            since[row].append(q[row].double().unflatten(0, (kv_heads, -1)).mean(1))
            mean = torch.stack(since[row]).mean(0)
            for head in range(kv_heads):
                assert len(found[row][head]) == SMALL.budget
                assert set(found[row][head]) == wanted(node, 1, mean[head], head, tokens, SMALL)
            if written[row] == END:
                since[row] = []


def test_bfloat16() -> None:
    node, index = made(300, dtype=torch.bfloat16)
    found = chosen(index.choose(0, node.rows(0, 3), readers(3)))
    assert all(len(one) == SMALL.budget for heads in found for one in heads)


@pytest.mark.parametrize("longest", [1, 5, 64])
def test_cuts(longest: int) -> None:
    torch.manual_seed(0)
    tokens = torch.where(torch.rand(200) < 0.1, END, WORD)
    of = sentence_numbers(tokens, torch.arange(20) == END, longest).tolist()
    for number, places in enumerate(sentences_of(tokens.tolist(), longest)):
        assert [of[place] for place in places] == [number] * len(places)
    even = sentence_numbers(tokens, None, longest)
    assert even.tolist() == [place // longest for place in range(200)]


def test_more_of_the_attention_than_a_random_choice() -> None:
    node, index = made(1000, 8, 2, replace(SMALL, budget=200), head_dim=64)
    q = node.rows(0, 8)
    found = chosen(index.choose(0, q, readers(8)))
    share = mass(node.facts, node.entries[0], q, found)
    assert share > 0.7
    assert mass(node.facts, node.entries[0], q, at_random(found, 1000)) < share / 2


def test_sentences_are_better_than_even_pieces() -> None:
    """Where the topic changes with the sentence."""
    node, index = made(1000, 8, 2, replace(SMALL, budget=100, longest=64), head_dim=64)
    q = node.rows(0, 16)
    cut = chosen(index.choose(0, q, readers(16)))
    node.facts = replace(node.facts, sentence_ends=lambda: None)
    method = replace(SMALL, budget=100, longest=64)
    even = chosen(node.index(method, some_tokens(node)).choose(0, q, readers(16)))
    assert mass(node.facts, node.entries[0], q, cut) > mass(node.facts, node.entries[0], q, even)


def test_the_choice_changes_slowly() -> None:
    """Less with the mean query than if every token chose by its own."""
    node, index = made(1000)
    topic = torch.full((1,), 3)
    same, fresh, other = Reader(WORD, 500, {}), [], []
    for _ in range(12):
        q = node.ask(0, topic) + 2 * node.draw(1, 4, 32)
        fresh.append(set(chosen(index.choose(0, q, readers(1, WORD)))[0][0]))
        other.append(set(chosen(index.choose(0, q, [same]))[0][0]))

    def moved(sets: list[set[int]]) -> int:
        return sum(len(b - a) for a, b in pairwise(sets[4:]))

    assert moved(other) < 0.7 * moved(fresh)


def test_the_first_token_of_a_sentence_may_read_everything() -> None:
    node, index = made(300, method=replace(SMALL, whole_first=True))
    states: list[dict[object, object]] = [{}, {}]
    sizes = []
    for written in ([WORD, END], [WORD, WORD], [WORD, WORD]):
        rows = [Reader(token, 500, state) for token, state in zip(written, states, strict=True)]
        found = chosen(index.choose(0, node.rows(0, 2), rows))
        sizes.append([len(heads[0]) for heads in found])
    assert sizes == [[300, 300], [80, 300], [80, 80]]


def test_heads_of_different_lengths() -> None:
    facts = with_ends(make_facts())
    node = Node(facts, 300)
    node.cut([300, 150])
    index = node.index(SMALL, some_tokens(node))
    for heads in chosen(index.choose(0, node.rows(0, 3), readers(3))):
        assert [len(one) for one in heads] == [80, 80]
        assert max(heads[1]) == 149
    node.cut([300, 60])
    index = node.index(SMALL, some_tokens(node))
    for heads in chosen(index.choose(0, node.rows(0, 3), readers(3))):
        assert [len(one) for one in heads] == [80, 60]


def test_nodes_within_the_budget() -> None:
    node = Node(with_ends(make_facts()), 80)
    assert node.maybe(SMALL, some_tokens(node)) is None
    node, _ = made(81)
    for entries in node.entries:
        entries.keys.fill_(2.0)
    found = node.index(SMALL, some_tokens(node)).choose(0, node.rows(0, 1), readers(1))
    assert len(chosen(found)[0][0]) == 80


def test_bytes() -> None:
    """A mean a sentence and head; labels are the same for all heads."""
    n = 4096
    _, index = made(n, 8, 8, SentenceBuckets(), head_dim=128, dtype=torch.bfloat16)
    count = index.layers[0].means.shape[1]
    assert n / 64 <= count < n / 8
    assert index.nbytes == 2 * (8 * count * 256 + 4 * count + 8 * n + 8 * 8)


@pytest.mark.parametrize("wrong", [{"budget": 3}, {"longest": 0}])
def test_options_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        SentenceBuckets(**wrong)  # type: ignore[arg-type]
