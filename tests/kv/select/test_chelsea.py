from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import SHAPES, Sequence, make_facts
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kv.method import Entries, Seen, join
from quire.kv.select.chelsea import SoftMatching, clusters


def by_rounds(keys: Tensor, keep: int) -> list[tuple[int, list[int]]]:
    """Soft matching of one head's keys [n, d]: each cluster's leading member and all members."""
    found = [(t, [t]) for t in range(len(keys))]
    while len(found) > keep:
        centres = [keys[members].double().mean(0) for _, members in found]
        links = []
        for a in range(0, len(found), 2):
            alike = {
                b: float(torch.cosine_similarity(centres[a], centres[b], dim=0))
                for b in range(1, len(found), 2)
            }
            best = max(alike, key=alike.__getitem__)
            links.append((alike[best], a, best))
        links.sort(reverse=True)
        gone = links[: min(len(found) - keep, len(found) // 2)]
        for _, a, b in gone:
            found[b] = (found[b][0], [*found[b][1], *found[a][1]])
        found = [cluster for i, cluster in enumerate(found) if i not in {a for _, a, _ in gone}]
    return found


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 16, 33])
@pytest.mark.parametrize("keep", [1, 2, 7, 16, 40])
def test_rounds(kv_heads: int, size: int, keep: int) -> None:
    keys = torch.randn(kv_heads, size, 8, generator=torch.Generator().manual_seed(size))
    label, lead = clusters(keys, keep)
    for head in range(kv_heads):
        wanted = by_rounds(keys[head], keep)
        assert lead[head].tolist() == [place for place, _ in wanted]
        for number, (_, members) in enumerate(wanted):
            mine = (label[head] == number).nonzero()[:, 0].tolist()
            assert mine == sorted(members)


def test_zero_keys_are_clustered_too() -> None:
    label, lead = clusters(torch.zeros(2, 9, 4), 2)
    assert lead.shape == (2, 2)
    assert label.unique().tolist() == [0, 1]


def blocks(middle: int, keep: int, chunk: int) -> list[tuple[int, int, int]]:
    """Even chunks of the middle, and how many clusters each keeps."""
    number = min(math.ceil(middle / chunk), keep)
    at = [i * middle // number for i in range(number + 1)]
    kept = [i * keep // number for i in range(number + 1)]
    return [(at[i], at[i + 1], kept[i + 1] - kept[i]) for i in range(number)]


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("budget", [9, 24, 0.5])
@pytest.mark.parametrize("mass_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt(
    heads: int, kv_heads: int, budget: float, mass_bias: bool, dtype: torch.dtype
) -> None:
    facts = make_facts(heads, kv_heads, dtype=dtype)
    sequence = Sequence.make(facts, 61)
    most = budget if isinstance(budget, int) else round(budget * 61)
    sinks, recent = min(3, most // 4), min(8, most // 2)
    found = SoftMatching(budget, 16, 3, 8, mass_bias).select(sequence.seen())
    assert found is not None
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for layer, entries in enumerate(found):
        assert len(entries) == most
        assert entries.keys.dtype == dtype
        assert (entries.bias is not None) == mass_bias
        for head in range(kv_heads):
            groups = [(t, [t]) for t in range(sinks)]
            for at, stop, keep in blocks(61 - sinks - recent, most - sinks - recent, 16):
                keys = sequence.keys[layer, head, sinks + at : sinks + stop]
                groups += [
                    (lead + sinks + at, [m + sinks + at for m in members])
                    for lead, members in by_rounds(keys.float(), keep)
                ]
            groups += [(t, [t]) for t in range(61 - recent, 61)]
            assert entries.positions[head].tolist() == [lead for lead, _ in groups]
            for held, mine in ((sequence.keys, entries.keys), (sequence.values, entries.values)):
                means = [held[layer, head][members].double().mean(0) for _, members in groups]
                torch.testing.assert_close(mine[head].double(), torch.stack(means), **close)
            if entries.bias is not None:
                counts = [len(members) for _, members in groups]
                torch.testing.assert_close(entries.bias[head].exp(), torch.tensor(counts).float())


def grown(sequence: Sequence, found: list[Entries]) -> Seen:
    """What the sequence holds once it has decoded to its end after a selection."""
    fresh = torch.arange(sequence.tokens, sequence.queries.shape[1])
    sequence.tokens = sequence.queries.shape[1]

    def entries(layer: int) -> Entries:
        at = fresh.expand(sequence.facts.kv_heads, -1)
        keys, values = sequence.keys[layer][:, fresh], sequence.values[layer][:, fresh]
        return join([found[layer], Entries(keys, values, at)])

    seen = sequence.seen()
    seen.entries = entries
    return seen


def test_decoding_clusters_what_leaves_the_newest() -> None:
    facts = make_facts(4, 2)
    sequence = Sequence.make(facts, 60, 76)
    method = SoftMatching(30, 16, 4, 8, mass_bias=True)
    found = method.select(sequence.seen())
    assert found is not None
    again = method.select(grown(sequence, found))
    assert again is not None
    share = (30 - 4 - 8) / (60 - 4 - 8)
    keep = round(16 * share)
    for layer, entries in enumerate(again):
        assert len(entries) == 30 + keep
        assert entries.positions[:, -8:].tolist() == [list(range(68, 76))] * 2
        torch.testing.assert_close(entries.part(0, 22).keys, found[layer].part(0, 22).keys)
        for head in range(2):
            block = sequence.keys[layer, head, 52:68]
            groups = by_rounds(block, keep)
            mine = entries.part(22, 22 + keep)
            assert mine.positions[head].tolist() == [52 + lead for lead, _ in groups]
            means = torch.stack([block[members].mean(0) for _, members in groups])
            torch.testing.assert_close(mine.keys[head], means, rtol=1e-4, atol=1e-4)
            assert entries.bias is not None
            assert entries.bias[head].exp().sum().item() == pytest.approx(76, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 50),
    budget=st.one_of(st.integers(1, 60), st.sampled_from([0.1, 0.5, 1.0])),
    chunk=st.integers(2, 20),
    sinks=st.integers(0, 6),
    recent=st.integers(0, 60),
    unrotate=st.booleans(),
)
def test_what_always_holds(
    size: int, budget: float, chunk: int, sinks: int, recent: int, unrotate: bool
) -> None:
    facts = make_facts(2, 2, layers=1)
    sequence = Sequence.make(facts, size)
    most = budget if isinstance(budget, int) else max(1, round(budget * size))
    method = SoftMatching(budget, chunk, sinks, recent, mass_bias=True, unrotate=unrotate)
    found = method.select(sequence.seen())
    assert (found is None) == (size <= most)
    for entries in found or []:
        assert len(entries) == most
        assert bool((entries.positions.diff() > 0).all())
        assert bool(entries.keys.isfinite().all())
        assert entries.bias is not None
        assert entries.bias.exp().sum(1).tolist() == pytest.approx([size] * 2, rel=1e-4)


def test_averages_without_rotation() -> None:
    """Equal keys before rotation stay the same key, however far apart."""
    facts = make_facts(1, 1, layers=1)
    sequence = Sequence.make(facts, 32)
    same = torch.ones(1, 32, 8)
    sequence.keys[0] = facts.rotate(0, same, torch.arange(32)[None])
    (entries,) = SoftMatching(4, 16, 0, 0, unrotate=True).select(sequence.seen()) or []
    back = facts.unrotate(0, entries.keys, entries.positions)
    torch.testing.assert_close(back, torch.ones_like(back), rtol=1e-4, atol=1e-4)


def test_within_its_budget_nothing_is_clustered_later() -> None:
    sequence = Sequence.make(make_facts(), 10, 40)
    method = SoftMatching(20, 8, 2, 4)
    assert method.select(sequence.seen()) is None
    for _ in range(30):
        sequence.step()
    assert method.select(sequence.seen()) is None


@pytest.mark.parametrize("options", [{"budget": 0}, {"chunk": 1}, {"sinks": -1}, {"recent": -1}])
def test_wrong_options(options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        SoftMatching(**options)
