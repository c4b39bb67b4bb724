from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import SHAPES, Sequence, every_head, make_facts, top

from quire.errors import InvalidRequestError
from quire.kv.select.prefixkv import SameLevel


def layer_scores(sequence: Sequence, layer: int) -> list[float]:
    return [sum(mass[t] for mass in sequence.mass[layer]) for t in range(sequence.tokens)]


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("budget", [5, 12, 0.5, 0.95])
def test_prompt(heads: int, kv_heads: int, budget: float) -> None:
    facts = make_facts(heads, kv_heads, layers=3)
    sequence = Sequence.make(facts, 40, seed=3)
    sequence.queries[0] *= 8  # concentrates the first layer's attention
    again = Sequence.make(facts, 40, seed=3)
    again.queries[0] *= 8
    again.held = [[[] for _ in heads_] for heads_ in again.held]
    again.mass = [[{} for _ in heads_] for heads_ in again.mass]
    again.tokens = 0
    for _ in range(40):
        again.step()
    most = budget if isinstance(budget, int) else round(budget * 40)

    found = SameLevel(budget).select(again.seen())
    assert found is not None
    sizes = [len(heads_[0]) for heads_ in found]
    assert sum(sizes) == 3 * most
    levels, next_levels = [], []
    for layer in range(3):
        assert all(h.tolist() == found[layer][0].tolist() for h in found[layer])
        scores = layer_scores(again, layer)
        middle = sizes[layer] - 2
        kept = found[layer][0].tolist()
        assert kept == [0, *top(list(range(1, 39)), scores.__getitem__, middle), 39]
        shares = sorted((s / sum(scores) for s in scores), reverse=True)
        levels.append(sum(shares[: middle - 1]) if middle else 0.0)
        next_levels.append(sum(shares[:middle]) if middle < 38 else 1.0)
    # One level p fits all: it is reached by the last entry that a layer takes, not before.
    assert max(levels) <= min(next_levels) + 1e-6
    assert sizes[0] < max(sizes) or most == 5


def reference(kept: int, prompt: int, tokens: int, share: bool, distance: int) -> list[int]:
    """One token in, and while there are too many, one out at the fixed place."""
    held = list(range(-kept, 0))  # names for what was held of the prompt
    for seen in range(prompt + 1, tokens + 1):
        held.append(seen)
        allowed = kept * seen // prompt if share else kept
        while len(held) > allowed:
            place = distance if distance > 0 else kept + distance
            del held[max(min(place, allowed - 1), min(1, allowed))]
    return held


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(2, 50),
    budget=st.one_of(st.integers(3, 50), st.sampled_from([0.3, 0.5, 1.0])),
    distance=st.sampled_from([-25, -5, -1, 0, 3, 40]),
    every=st.sampled_from([1, 5]),
)
def test_deletes_at_one_place_while_decoding(
    prompt: int, budget: float, distance: int, every: int
) -> None:
    facts = make_facts(2, 2, layers=2)
    share = isinstance(budget, float)
    if share and not (distance == -5 and budget * prompt >= 10):
        every = 1  # where few entries move the place, it matters when they are deleted
    method = SameLevel(budget, distance=distance, every=every)
    sequence = Sequence.make(facts, prompt, prompt + 30)
    found = method.select(sequence.seen())
    kept = [len(layer[0]) for layer in found] if found else [prompt] * 2
    first = [[list(h) for h in layer] for layer in sequence.held]
    if found:
        first = [[h.tolist() for h in layer] for layer in found]
    history = sequence.decode(method)
    held = history[-1]
    for layer, head in every_head(facts):
        if found is None and not share:  # within its budget so far: the place is the budget's
            assert len(held[layer][head]) == min(budget, prompt + 30)
            continue
        names = reference(kept[layer], prompt, prompt + 30, share, distance)
        mine = first[layer][head]
        wanted = [mine[n + kept[layer]] if n < 0 else n - 1 for n in names]
        assert held[layer][head] == wanted


def test_a_short_prompt_grows_to_its_budget() -> None:
    sequence = Sequence.make(make_facts(), 5, 80)
    sizes = [len(held[0][0]) for held in sequence.decode(SameLevel(40, every=1))]
    assert sizes == [min(n, 40) for n in range(6, 81)]
    assert sequence.held[0][0] == [*range(15), *range(55, 80)]


@pytest.mark.parametrize("options", [{"budget": 0}, {"first": -1}, {"every": 0}])
def test_wrong_options(options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        SameLevel(**options)
