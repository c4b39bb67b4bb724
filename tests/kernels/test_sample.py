"""Choosing tokens: the kernels, PyTorch's code in the sampler, and what they mean in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import threads, using, with_each
from torch import Tensor

from quire.decode import sampling
from quire.decode.params import SamplingParams
from quire.decode.rng import uniform
from quire.decode.sampling import RowState
from quire.kernels import sampling as kernels

LAST = 0.999999999
# Masses are sums of float32 exponentials, each exact to about 2^-22. A draw, or the border of
# top-p, that lies nearer than this to a token's edge may fall on either side of it.
NEAR = 2e-6


@dataclass(frozen=True)
class Options:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def choose(logits: Tensor, options: list[Options], draws: list[float]) -> list[int]:
    """The kernel's tokens, the same with every instruction set unless rounding is near."""
    return kernels.sample(
        logits,
        [o.temperature for o in options],
        [o.top_k for o in options],
        [o.top_p for o in options],
        [o.min_p for o in options],
        torch.tensor(draws, dtype=torch.float64),
    ).tolist()


def masses(logits: Tensor, o: Options, slack: float) -> np.ndarray:
    """The meaning of the options in float64: each token's share of the draw, one row.

    ``slack`` moves the borders of top-p and min-p outwards.
    """
    raw = logits.double().numpy()
    x = (raw - raw.max()) / np.float32(o.temperature).astype(float)
    if 0 < o.top_k < len(x):
        x = np.where(raw < np.sort(raw)[-o.top_k], -np.inf, x)
    weights = np.exp(x)
    if o.top_p < 1:
        order = np.argsort(-raw, kind="stable")
        share = weights[order] / weights.sum()
        border = max(np.float32(o.top_p) + slack, 1e-12)  # the likeliest always stays
        dropped = order[np.cumsum(share) - share >= border]
        weights[dropped] = 0
    if o.min_p > 0:
        weights[x < min(math.log(np.float32(o.min_p)) - slack, 0.0)] = 0
    return weights / weights.sum()


def allowed(logits: Tensor, options: Options, draw: float) -> set[int]:
    """The tokens that a draw may give: one, unless it is near an edge."""
    found: set[int] = set()
    for slack in (-NEAR, 0.0, NEAR):
        mass = masses(logits, options, slack)
        ends = np.cumsum(mass)
        low, high = draw - NEAR, draw + NEAR
        reached = (ends > low) & (ends - mass <= high) & (mass > 0)
        found |= set(np.flatnonzero(reached).tolist())
    return found


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 63, 1000])
@pytest.mark.usefixtures("isa")
def test_argmax(vocab: int) -> None:
    torch.manual_seed(vocab)
    for rows in (0, 1, 3):
        logits = torch.randn(rows, vocab)
        assert kernels.argmax(logits).tolist() == [int(row.argmax()) for row in logits]
    ties = torch.randint(-3, 3, (50, vocab)).float()
    expected = [row.tolist().index(max(row.tolist())) for row in ties]
    assert kernels.argmax(ties).tolist() == expected
    masked = torch.full((2, vocab), -math.inf)
    masked[1, -1] = -1e30
    assert kernels.argmax(masked).tolist() == [0, vocab - 1]


@pytest.mark.usefixtures("isa")
def test_argmax_sees_every_place() -> None:
    for vocab in (15, 40, 129):
        logits = torch.eye(vocab) - 5
        assert kernels.argmax(logits).tolist() == list(range(vocab))


def random_options(rng: np.random.Generator, vocab: int) -> Options:
    return Options(
        float(rng.choice([0.05, 0.7, 1.0, 1.3, 10.0])),
        int(rng.choice([0, 0, 1, 2, 5, 40, vocab - 1, vocab, 10 * vocab])),
        float(rng.choice([1.0, 1.0, 0.95, 0.5, 0.1, 1e-6, 0.9999])),
        float(rng.choice([0.0, 0.0, 0.02, 0.5, 1.0])),
    )


@pytest.mark.parametrize("vocab", [1, 2, 15, 64, 65, 1000, 20000])
def test_sample_means_what_the_sampler_says(vocab: int) -> None:
    """Random options in every row, against float64 and against PyTorch's code."""
    rng = np.random.default_rng(vocab)
    rows = 120 if vocab < 10000 else 30
    torch.manual_seed(vocab)
    logits = torch.randn(rows, vocab) * torch.rand(rows, 1) * 8
    logits[::5] = logits[::5].round()  # ties at every border
    logits[1::7, : vocab // 3] = -math.inf
    options = [random_options(rng, vocab) for _ in range(rows)]
    empty = np.empty(0, dtype=np.int32)
    states = [
        RowState(
            SamplingParams(temperature=o.temperature, top_k=o.top_k, top_p=o.top_p, min_p=o.min_p),
            seed,
            empty,
            [0] * (seed % 3),
        )
        for seed, o in enumerate(options)
    ]
    draws = uniform([s.seed for s in states], [len(s.output) for s in states]).tolist()
    before = logits.clone()
    expected = [allowed(*row) for row in zip(logits, options, draws, strict=True)]
    assert sum(len(tokens) == 1 for tokens in expected) > 0.8 * rows  # few draws are near an edge
    for name, found in with_each(lambda: choose(logits, options, draws)).items():
        for row, token in enumerate(found):
            assert token in expected[row], (name, row, options[row])
    assert torch.equal(logits, before)
    for name, found in with_each(lambda: sampling._draw(logits, states).tolist()).items():
        assert found == choose_with(name, logits, options, draws)
    with using("plain"):
        plain = sampling._draw(logits.clone(), states).tolist()
    # PyTorch adds up top-p in float32: the more tokens, the farther its border can be off.
    apart = [row for row, token in enumerate(plain) if token not in expected[row]]
    assert len(apart) <= rows // 50, [(options[row], plain[row], expected[row]) for row in apart]


def choose_with(name: str, logits: Tensor, options: list[Options], draws: list[float]) -> list[int]:
    with using(name):
        return choose(logits, options, draws)


@pytest.mark.usefixtures("isa")
def test_top_k_keeps_ties_and_top_p_does_not() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]])

    def seen(options: Options) -> set[int]:
        points = [*np.linspace(0, LAST, 400).tolist()]
        rows = logits.repeat(len(points), 1)
        return set(choose(rows, [options] * len(points), points))

    assert seen(Options(top_k=1)) == {1, 3}
    assert seen(Options(top_k=3)) == {1, 2, 3, 4, 5}
    assert seen(Options(top_k=6)) == {0, 1, 2, 3, 4, 5}
    assert seen(Options()) == set(range(7))
    assert seen(Options(top_p=0.01)) == {1}  # the lowest of the likeliest
    assert seen(Options(top_p=0.31)) == {1, 3}  # one of them has 0.307
    assert seen(Options(top_p=0.62)) == {1, 3, 2}
    assert seen(Options(min_p=1.0)) == {1, 3}
    assert seen(Options(min_p=0.36)) == {1, 2, 3, 4, 5}  # e^-1 is 0.368
    assert seen(Options(min_p=0.37)) == {1, 3}
    assert seen(Options(temperature=0.01)) == {1, 3}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("vocab", [1, 2, 15, 64, 130])
def test_first_and_last_draw(vocab: int) -> None:
    """A draw of 0 takes the first token that has any mass, the largest draw the last one."""
    torch.manual_seed(vocab)
    logits = torch.randn(2, vocab)
    assert choose(logits, [Options()] * 2, [0.0, LAST]) == [0, vocab - 1]
    logits[:, : vocab // 2] = -math.inf
    logits[:, vocab // 2 + 1 :] = -math.inf
    for options in (Options(), Options(top_p=0.5), Options(top_k=1), Options(min_p=0.5)):
        assert choose(logits, [options] * 2, [0.0, LAST]) == [vocab // 2] * 2


@pytest.mark.usefixtures("isa")
def test_far_apart_and_large_logits() -> None:
    """Exponentials that vanish, and logits as large as bfloat16 models give."""
    logits = torch.tensor([[3e4, 3e4 - 200, -3e38, 3e4], [-1e4, -1e4 - 1, -1e4 - 50, -2e4]])
    for options in (Options(), Options(top_p=0.99), Options(min_p=1e-9), Options(top_k=3)):
        assert choose(logits, [options] * 2, [0.0, 0.0]) == [0, 0]
        assert choose(logits, [options] * 2, [LAST, 0.5]) == [3, 0]
    assert choose(logits, [Options()] * 2, [0.49, 0.9]) == [0, 1]


@pytest.mark.usefixtures("isa")
def test_frequencies() -> None:
    """Evenly spaced draws give each token its share."""
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 2
    points = ((np.arange(4000) + 0.5) / 4000).tolist()
    for options in (Options(), Options(0.7, top_k=6), Options(1.5, top_p=0.8, min_p=0.05)):
        found = choose(logits.repeat(4000, 1), [options] * 4000, points)
        counts = np.bincount(found, minlength=12) / 4000
        np.testing.assert_allclose(counts, masses(logits[0], options, 0.0), atol=5e-4)


@pytest.mark.usefixtures("isa")
def test_more_rows_than_a_loop_takes_and_several_threads() -> None:
    rows = 70000
    logits = torch.zeros(rows, 2)
    logits[torch.arange(rows), torch.arange(rows) % 2] = 50
    options = [Options()] * rows
    expected = [i % 2 for i in range(rows)]
    assert choose(logits, options, [0.5] * rows) == expected
    with threads(3):
        assert choose(logits, options, [0.5] * rows) == expected
        assert kernels.argmax(logits).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(
    numbers=st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.floats(-30, 30, width=32)),
        min_size=1,
        max_size=90,
    ),
    masked=st.sets(st.integers(0, 89)),
    temperature=st.sampled_from([0.01, 0.5, 1.0, 3.0, 100.0]),
    top_k=st.one_of(st.just(0), st.integers(1, 100)),
    top_p=st.one_of(st.just(1.0), st.floats(2**-20, 1.0, width=32)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1, width=32)),
    draw=st.one_of(st.sampled_from([0.0, 0.5, LAST, 1 - 2**-53]), st.floats(0, LAST)),
)
def test_the_chosen_token_is_allowed(
    numbers: list[float],
    masked: set[int],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    draw: float,
) -> None:
    logits = torch.tensor([numbers])
    gone = [token for token in masked if token < len(numbers)]
    if len(gone) < len(numbers):
        logits[0, gone] = -math.inf
    options = Options(temperature, top_k, top_p, min_p)
    expected = allowed(logits[0], options, draw)
    for name, (token,) in with_each(lambda: choose(logits, [options], [draw])).items():
        assert token in expected, name


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("temperature", [1e-30, 1e-39])
def test_almost_no_temperature(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, 2.0]])
    for options in (Options(temperature), Options(temperature, top_p=0.9)):
        assert choose(logits, [options], [0.3]) == [2]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("vocab", [1, 15, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_mask(vocab: int, spare: int) -> None:
    """Against single bits: some rows only, words to spare, words of all ones and all zeros."""
    rng = np.random.default_rng(vocab)
    words = -(-vocab // 32) + spare
    for rows, chosen in ((0, []), (1, [0]), (7, [5, 0, 3]), (7, [])):
        logits = torch.randn(rows, vocab)
        masks = rng.integers(0, 1 << 32, (len(chosen), words), dtype=np.uint32).view(np.int32)
        masks[:, rng.random(words) < 0.3] = -1
        masks[:, rng.random(words) < 0.3] = 0
        expected = logits.clone()
        for mask, row in zip(masks, chosen, strict=True):
            for token in range(vocab):
                if not int(mask[token // 32]) >> token % 32 & 1:
                    expected[row, token] = -math.inf
        kernels.mask(logits, chosen, masks)
        assert torch.equal(logits, expected)
