"""A2ATS against the algorithm in loops; what the fit to queries is worth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from clustered import SHAPES, Node, at_random, chosen, mass, readers
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kv.fetch.quantised import Codes, QuantisedKeys, codebook
from quire.kv.method import Calibration, Facts, Reader
from toy import make_facts

SMALL = QuantisedKeys(keep=0.1, sinks=4, recent=16, distance=300)


def with_texts(facts: Facts, tokens: int = 400, seed: int = 3) -> Facts:
    """Keys that differ most where queries hardly look."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    half = facts.head_dim // 2
    loud = torch.ones(facts.head_dim)
    loud[half // 4 : half] = loud[half + half // 4 :] = 5.0  # all but a quarter of RoPE's pairs
    queries = [draw(tokens, facts.heads, facts.head_dim) / loud**2 for _ in range(facts.layers)]
    keys = [draw(tokens, facts.kv_heads, facts.head_dim) * loud for _ in range(facts.layers)]
    known = Calibration(queries, keys, keys)
    return replace(facts, calibrate=lambda: known)


def like_the_texts(facts: Facts, n: int, start: int = 0) -> Node:
    """A node whose keys are like those of the calibration."""
    node = Node(facts, n, start=start)
    texts = with_texts(facts, n, seed=9).calibrate()
    for layer, keys in enumerate(texts.keys):
        entries = node.entries[layer]
        keys = facts.rotate(layer, keys.transpose(0, 1), entries.positions)
        node.entries[layer] = replace(entries, keys=keys.to(facts.dtype))
    return node


def made(
    n: int = 330, heads: int = 4, kv_heads: int = 2, method: QuantisedKeys = SMALL, start: int = 0
) -> tuple[Node, Codes]:
    node = like_the_texts(with_texts(make_facts(heads, kv_heads)), n, start)
    index = node.index(method)
    assert isinstance(index, Codes)
    return node, index


def some_queries(facts: Facts, rows: list[Reader]) -> Tensor:
    raw = with_texts(facts, len(rows), seed=11).calibrate().queries[1]
    at = torch.tensor([reader.position for reader in rows])[:, None]
    return 3 * facts.rotate(1, raw, at)


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("start", [0, 50])
def test_against_the_algorithm(heads: int, kv_heads: int, start: int) -> None:
    node, index = made(330, heads, kv_heads, start=start)
    facts = node.facts
    book = index.book
    assert book.centres[1].shape == (kv_heads, 100, 32)
    rows = [Reader(5, position, {}) for position in (380, 777, 1500)]
    q = some_queries(facts, rows)
    found = chosen(index.choose(1, q, rows))
    everywhere = torch.arange(start, start + 330)
    middle = [t for t in range(330) if start + t >= 4 and t < 330 - 16]
    always = set(range(330)) - set(middle)
    for head in range(kv_heads):
        lower = book.whiten[1][head].double()
        centres = book.centres[1][head].double()
        keys = facts.unrotate(1, node.entries[1].keys[head], everywhere).double()
        apart = torch.cdist(keys @ lower, centres @ lower)
        codes = index.layers[1].codes[head]
        mine = apart[torch.tensor(middle), codes[torch.tensor(middle)].long()]
        torch.testing.assert_close(mine, apart[middle].amin(-1), rtol=1e-3, atol=1e-4)
        for row, reader in enumerate(rows):
            taken: set[int] = set()
            worst = {}
            for query in range(head * facts.group, (head + 1) * facts.group):
                raw = facts.unrotate(1, q[row, query][None], torch.tensor([reader.position]))
                far = facts.rotate(1, raw, torch.tensor([SMALL.distance]))[0].double()
                score = {t: float(far @ centres[codes[t]]) for t in middle}
                best = sorted(middle, key=lambda t: -score[t])[: math.ceil(0.1 * 330)]
                worst[query] = (score, score[best[-1]])
                taken |= {t for t in best if score[t] > score[best[-1]] + 1e-4}
                assert len(best) == index.count
            read = set(found[row][head])
            assert always <= read
            assert taken <= read
            for token in read - always:
                assert any(score[token] >= least - 1e-4 for score, least in worst.values())
            assert 33 <= len(read - always) <= 33 * facts.group


def test_the_error_that_is_fitted() -> None:
    """The mean square of a score's error is the length of the error in the whitened space."""
    facts = with_texts(make_facts(8, 2))
    book = codebook(facts, SMALL)
    queries = facts.calibrate().queries[0]
    far = facts.rotate(0, queries, torch.tensor(SMALL.distance)).double()
    torch.manual_seed(0)
    error = torch.randn(2, 5, 32).double()
    scale = []
    for head in range(2):
        pooled = far[:, head * 4 : (head + 1) * 4].flatten(0, 1)
        wanted = (error[head] @ pooled.T).square().mean(1)
        scale.append(wanted / (error[head] @ book.whiten[0][head].double()).square().sum(1))
        assert float(scale[-1].std() / scale[-1].mean()) < 1e-3


def error_of_scores(node: Node, index: Codes) -> float:
    """At the fixed distance, relative to the scores."""
    facts = node.facts
    raw = with_texts(facts, 50, seed=11).calibrate().queries[0]
    far = facts.rotate(0, raw, torch.tensor(SMALL.distance)).unflatten(1, (facts.kv_heads, -1))
    keys = facts.unrotate(0, node.entries[0].keys, node.entries[0].positions)[:, 4:-16]
    codes = index.layers[0].codes[:, 4:-16].long()
    near = index.book.centres[0].gather(1, codes[..., None].expand_as(keys))
    exact = torch.einsum("rhgd,hnd->rhgn", far, keys)
    wrong = torch.einsum("rhgd,hnd->rhgn", far, near) - exact
    return float(wrong.square().mean() / exact.square().mean())


def test_the_fit_to_queries_pays() -> None:
    node, index = made(600)
    plain = node.index(replace(SMALL, query_aware=False))
    assert isinstance(plain, Codes)
    fitted, unfitted = error_of_scores(node, index), error_of_scores(node, plain)
    assert fitted < 0.8 * unfitted


def test_more_of_the_attention_than_a_random_choice() -> None:
    """Keys in clusters: as many as there are codes for."""
    facts = make_facts(4, 2, head_dim=64)
    node = Node(facts, 1000, topics=15)
    at = torch.arange(1000)
    known = Calibration(
        [facts.unrotate(i, q, at[:, None]) for i, q in enumerate(node.queries)],
        [facts.unrotate(i, e.keys, at).transpose(0, 1) for i, e in enumerate(node.entries)],
        [],
    )
    # Seen from afar: the topics lie in pairs that RoPE hardly turns.
    slow = torch.zeros(64)
    slow[20:32] = slow[52:] = 2.0
    known = Calibration([q * slow for q in known.queries], [k * slow for k in known.keys], [])
    node.facts = replace(facts, calibrate=lambda: known)
    for layer, keys in enumerate(known.keys):
        keys = facts.rotate(layer, keys.transpose(0, 1), at)
        node.entries[layer] = replace(node.entries[layer], keys=keys)
    index = node.index(replace(SMALL, distance=600))
    rows = readers(8, position=1000)
    q = facts.rotate(0, known.queries[0][100:900:100], torch.tensor(1000))
    found = chosen(index.choose(0, q, rows))
    share = mass(node.facts, node.entries[0], q, found)
    assert share > 2 * mass(node.facts, node.entries[0], q, at_random(found, 1000))


def test_heads_of_different_lengths() -> None:
    node = like_the_texts(with_texts(make_facts()), 330)
    node.cut([330, 120])
    index = node.index(SMALL)
    for heads in chosen(index.choose(0, node.rows(0, 3), readers(3))):
        assert set(range(314, 330)) | {0, 1, 2, 3} <= set(heads[0])
        assert max(heads[1]) == 119
        assert set(range(104, 120)) | {0, 1, 2, 3} <= set(heads[1])


def test_one_codebook_for_all_nodes_of_a_model() -> None:
    facts = with_texts(make_facts())
    first, second = like_the_texts(facts, 200), like_the_texts(facts, 300, start=200)
    a, b = first.index(SMALL), second.index(SMALL)
    assert isinstance(a, Codes)
    assert isinstance(b, Codes)
    assert a.book is b.book
    other = first.index(replace(SMALL, codes=7))
    assert isinstance(other, Codes)
    assert other.book.centres[0].shape[1] == 7


def test_few_or_equal_tokens() -> None:
    # 4 sinks, 16 recent, and a tenth for each of two query heads
    assert like_the_texts(with_texts(make_facts()), 25).maybe(SMALL) is None
    assert like_the_texts(with_texts(make_facts()), 29).maybe(SMALL) is not None
    flat = make_facts()
    ones = [torch.ones(40, heads, 32) for heads in (4, 4)]
    same = Calibration(ones, [x[:, :2] for x in ones], [])
    node = Node(replace(flat, calibrate=lambda: same), 100)
    found = chosen(node.index(SMALL).choose(0, node.rows(0, 2), readers(2)))
    assert all(30 <= len(one) <= 40 for heads in found for one in heads)


def test_bytes() -> None:
    """A code for each token and head, and which one of its code's tokens it is."""
    n = 4096
    facts = make_facts(8, 8, head_dim=128, dtype=torch.bfloat16)
    node = like_the_texts(with_texts(facts, tokens=64), n)
    node.facts = with_texts(facts, tokens=64)
    codes = 64 // 4
    assert node.index(QuantisedKeys()).nbytes == 2 * 8 * (n * (2 + 2) + 4 * codes)


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"codes": 0}, {"distance": 64}])
def test_options_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        QuantisedKeys(**wrong)  # type: ignore[arg-type]
