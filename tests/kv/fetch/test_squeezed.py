"""Squeezed attention against the algorithm in loops, and what it finds of the attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from clustered import SHAPES, Node, at_random, attention, chosen, mass

from quire.errors import InvalidRequestError
from quire.kv.fetch.squeezed import Centroids, SqueezedAttention
from quire.kv.method import Calibration
from toy import make_facts

SMALL = SqueezedAttention(window=20, keep=0.25)


def made(node: Node, method: SqueezedAttention = SMALL) -> Centroids:
    index = node.index(method)
    assert isinstance(index, Centroids)
    return index


def shares_of(node: Node, index: Centroids, layer: int, q: torch.Tensor) -> list[dict[int, float]]:
    """For each head, what a token of each cluster gets of one row, by loops in float64."""
    facts = node.facts
    found = []
    for head in range(facts.kv_heads):
        level = index.clusters[layer][0]
        labels = level.labels[head].tolist()
        sizes = {c: labels.count(c) for c in range(level.centroids.shape[1]) if c in labels}
        total = dict.fromkeys(sizes, 0.0)
        for query in range(head * facts.group, (head + 1) * facts.group):
            score = {
                c: float(q[query].double() @ level.centroids[head, c].double()) * facts.scale
                for c in sizes
            }
            top = max(score.values())
            whole = sum(n * torch.tensor(score[c] - top).exp().item() for c, n in sizes.items())
            for c in sizes:
                total[c] += torch.tensor(score[c] - top).exp().item() / whole / facts.group
        found.append(total)
    return found


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_against_the_algorithm(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    node = Node(make_facts(heads, kv_heads, dtype=dtype), 301, start=7)
    index = made(node)
    # Clusters: every older token in one, centroids the means of their keys.
    for layer, entries in enumerate(node.entries):
        level = index.clusters[layer][0]
        count = round(0.05 * 281)
        assert level.centroids.shape == (kv_heads, count, 32)
        assert (level.labels[:, -20:] == count).all()
        assert (level.labels[:, :-20] < count).all()
        for head in range(kv_heads):
            for c in set(level.labels[head, :-20].tolist()):
                keys = entries.keys[head][level.labels[head] == c].float()
                torch.testing.assert_close(
                    level.centroids[head, c].float(), keys.mean(0), rtol=0.02, atol=0.02
                )
    # The threshold: a quantile over all layers, heads and tokens of the window's mean shares.
    pooled: list[float] = []
    for layer in range(2):
        seen = [shares_of(node, index, layer, q) for q in node.queries[layer][-20:]]
        for head in range(kv_heads):
            for label in index.clusters[layer][0].labels[head, :-20].tolist():
                pooled.append(sum(row[head][label] for row in seen) / 20)
    above = sum(value > index.thresholds[0] * (1 + 1e-4) for value in pooled)
    reached = sum(value > index.thresholds[0] * (1 - 1e-4) for value in pooled)
    assert above <= 0.25 * len(pooled) <= reached
    # Online.
    q = node.rows(1, 3)
    found = chosen(index.choose(1, q))
    for row in range(3):
        shares = shares_of(node, index, 1, q[row])
        for head in range(kv_heads):
            labels = index.clusters[1][0].labels[head].tolist()
            for token in range(281):
                share = shares[head][labels[token]]
                if abs(share - index.thresholds[0]) > 1e-3 * share:
                    assert (token in found[row][head]) == (share > index.thresholds[0])
            assert found[row][head][-20:] == list(range(281, 301))


@pytest.mark.parametrize("levels", [1, 2])
def test_more_of_the_attention_than_a_random_choice(levels: int) -> None:
    node = Node(make_facts(8, 2, head_dim=64), 1000, topics=30)
    index = made(node, replace(SMALL, levels=levels, keep=0.15))
    q = node.rows(0, 8)
    found = chosen(index.choose(0, q))
    read = sum(len(one) for heads in found for one in heads) / 16
    assert read < 0.4 * 1000
    share = mass(node.facts, node.entries[0], q, found)
    assert share > (0.9 if levels == 1 else 0.8)
    assert mass(node.facts, node.entries[0], q, at_random(found, 1000)) < share / 2


def test_keep_is_the_share_that_the_window_would_read() -> None:
    """The window's queries, averaged, are above the threshold for that share of the tokens."""
    node = Node(make_facts(), 800)
    for keep in (0.1, 0.3, 0.5, 1.0):
        index = made(node, replace(SMALL, keep=keep))
        kept = 0.0
        for layer in range(2):
            q = node.queries[layer][-20:].unflatten(1, (2, 2)).permute(1, 0, 2, 3).flatten(1, 2)
            labels = index.clusters[layer][0].labels[:, :-20].long()
            kept += float(index.kept(layer, q[None], 0)[0].gather(1, labels).float().mean()) / 2
        assert kept <= keep
        assert kept > 0.6 * keep


def test_heads_read_different_numbers() -> None:
    """One threshold for all: a head whose attention is spread reads more tokens."""
    node = Node(make_facts(2, 2), 600, topics=6)
    for entries in node.entries:
        entries.keys[0] *= 0.3
    index = made(node)
    found = chosen(index.choose(0, node.rows(0, 6)))
    assert len({len(one) for heads in found for one in heads}) > 2
    exact = attention(node.facts, node.entries[0], node.rows(0, 6))
    assert exact[:, 0].amax() < exact[:, 1].amax()


def test_a_second_level_only_leaves_out() -> None:
    node = Node(make_facts(), 900, topics=40)
    one, two = made(node), made(node, replace(SMALL, levels=2))
    upper = two.clusters[0][1]
    assert upper.centroids.shape[1] == round(0.01 * 880)
    assert upper.sizes.sum(-1).tolist() == [880, 880]
    torch.testing.assert_close(
        (upper.centroids * upper.sizes[..., None]).sum(1) / 880,
        node.entries[0].keys[:, :-20].mean(1),
        rtol=1e-3,
        atol=1e-3,
    )
    q = node.rows(0, 4)
    rows = q.unflatten(1, (2, 2))
    above = two.kept(0, rows, 1).gather(-1, upper.labels.long().expand(4, -1, -1))
    assert not above.all()
    assert not (two.kept(0, rows, 0) & ~above).any()
    assert two.nbytes > one.nbytes


def test_heads_of_different_lengths() -> None:
    node = Node(make_facts(), 300)
    node.cut([300, 170])
    index = made(node)
    found = chosen(index.choose(1, node.rows(1, 4)))
    for heads in found:
        assert set(range(280, 300)) <= set(heads[0])
        assert max(heads[1]) == 169
        assert set(range(150, 170)) <= set(heads[1])
    assert index.clusters[1][0].sizes.sum(-1).tolist() == [280, 150]


def test_without_queries() -> None:
    """A node that was cut: the calibration's queries stand in."""
    facts = make_facts()
    node = Node(facts, 400)
    texts = [facts.unrotate(0, q, torch.arange(400)[:, None]) for q in node.queries]
    node.facts = replace(facts, calibrate=lambda: Calibration(texts, [], []))
    index = node.index(SMALL, window=False)
    node.queries = [facts.rotate(0, t[-20:], torch.arange(400, 420)[:, None]) for t in texts]
    wanted = made(node)
    assert isinstance(index, Centroids)
    assert index.thresholds == pytest.approx(wanted.thresholds)


def test_few_or_equal_tokens() -> None:
    node = Node(make_facts(), 40)
    assert node.maybe(SMALL) is None
    node = Node(make_facts(), 41)
    assert node.maybe(SMALL) is not None
    for entries in node.entries:
        entries.keys.fill_(1.0)
    chosen(made(node).choose(0, node.rows(0, 2)))
    loud = Node(make_facts(), 200)
    for entries in loud.entries:
        entries.keys.mul_(1000)
    found = chosen(made(loud).choose(0, 1000 * loud.rows(0, 2)))
    assert all(len(one) > 20 for heads in found for one in heads)


def test_bytes() -> None:
    """5% of the keys, and a label for each token."""
    n = 4096
    node = Node(make_facts(8, 8, head_dim=128, dtype=torch.bfloat16), n)
    index = made(node, SqueezedAttention(iterations=1))
    keys = 2 * 8 * n * 128 * 2
    count = round(0.05 * (n - 100))
    assert index.nbytes == 2 * 8 * (count * (128 * 2 + 4) + 2 * n)
    assert index.nbytes < 0.06 * keys


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"window": 0}, {"levels": 3}, {"centroids": 5.0}])
def test_options_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        SqueezedAttention(**wrong)  # type: ignore[arg-type]
