"""The vectorised sampler against a slow one that does each row by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.decode.params import SamplingParams
from quire.decode.rng import uniform
from quire.decode.sampling import RowState, prompt_logprobs, sample
from quire.kernels import native


def row(output: list[int] | None = None, seed: int = 1, **options: object) -> RowState:
    params = SamplingParams(**options)  # type: ignore[arg-type]
    return RowState(params, seed, np.array([1, 2, 2], dtype=np.int32), output or [], (0,))


def plain(logits: list[float], state: RowState, shift: float = 0.0) -> int:
    """One row, step by step, in float64; ``shift`` moves the random point."""
    params, values = state.params, [float(v) for v in logits]
    for token, bias in params.logit_bias.items():
        if 0 <= token < len(values):
            values[token] += bias
    if params.repetition_penalty != 1:
        for token in {*state.prompt.tolist(), *state.output} & set(range(len(values))):
            scale = params.repetition_penalty
            values[token] = values[token] / scale if values[token] > 0 else values[token] * scale
    for token in set(state.output):
        values[token] -= params.presence_penalty
        values[token] -= params.frequency_penalty * state.output.count(token)
    banned = set()
    if len(state.output) < params.min_tokens:
        banned |= {*state.eos_ids, *params.stop_token_ids}
    for word in state.bad_words:
        head = list(word[:-1])
        if state.output[len(state.output) - len(head) :] == head:
            banned.add(word[-1])
    if not set(range(len(values))) <= banned:
        values = [-math.inf if i in banned else v for i, v in enumerate(values)]
    if params.greedy:
        return values.index(max(values))
    values = [v / params.temperature for v in values]
    if 0 < params.top_k < len(values):
        floor = sorted(values, reverse=True)[params.top_k - 1]
        values = [v if v >= floor else -math.inf for v in values]
    weights = softmax(values)
    if params.top_p < 1:
        order = sorted(range(len(values)), key=lambda i: (-weights[i], i))
        mass = 0.0
        for token in order:
            if mass >= params.top_p:
                values[token] = -math.inf
            mass += weights[token]
        weights = softmax(values)
    if params.min_p:
        floor = params.min_p * max(weights)
        values = [v if w >= floor else -math.inf for v, w in zip(values, weights, strict=True)]
        weights = softmax(values)
    point = float(uniform(state.seed, len(state.output))) + shift
    mass = 0.0
    for token, weight in enumerate(weights):
        mass += weight
        if mass > point:
            return token
    return max(i for i, w in enumerate(weights) if w > 0)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 3, 100]),
        "top_p": st.sampled_from([0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "repetition_penalty": st.sampled_from([1.0, 1.5, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 1.2]),
        "frequency_penalty": st.sampled_from([0.0, -0.4]),
        "logit_bias": st.sampled_from([{}, {3: 2.0, 4: -9.0}, {500: 1.0}]),
        "min_tokens": st.sampled_from([0, 2]),
        "stop_token_ids": st.sampled_from([(), (5,)]),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 6, 40]),
    rows=st.lists(st.tuples(OPTIONS, st.integers(0, 2**40)), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
)
def test_against_the_plain_sampler(
    vocab: int, rows: list[tuple[dict[str, object], int]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    logits = (generator.standard_normal((len(rows), vocab)) * 3).astype(np.float32)
    states = []
    for options, row_seed in rows:
        output = generator.integers(0, vocab, generator.integers(0, 4)).tolist()
        state = row(output, row_seed, **options)
        state.bad_words = ((1,), (2, 3), (*output[-1:], 0))
        states.append(state)
    found = sample(torch.from_numpy(logits.copy()), states).tokens
    for index, state in enumerate(states):
        expected = plain(logits[index].tolist(), state)
        if found[index] != expected:  # allowed only when the draw is on a boundary
            assert not state.params.greedy
            near = {plain(logits[index].tolist(), state, shift) for shift in (-1e-5, 1e-5)}
            assert found[index] in near


def test_rows_do_not_depend_on_their_company() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 300) * 4
    states = [
        row([5] * (i % 3), seed=i, temperature=0.3 * (i % 4), top_p=[1.0, 0.8][i % 2], top_k=i % 7)
        for i in range(64)
    ]
    together = sample(logits.clone(), states).tokens
    for i in range(64):
        assert sample(logits[i : i + 1].clone(), [states[i]]).tokens == [together[i]]
    order = torch.randperm(64)
    mixed = sample(logits[order].clone(), [states[i] for i in order.tolist()]).tokens
    assert mixed == [together[i] for i in order.tolist()]


def test_frequencies_follow_the_distribution() -> None:
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    states = [row(seed=i) for i in range(8000)]
    tokens = sample(weights.log().expand(8000, 4).clone(), states).tokens
    counts = np.bincount(tokens, minlength=4)
    expected = 8000 * weights.numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 20  # 3 degrees of freedom


def test_bad_words_of_several_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0, 8.0]])
    state = row([1], temperature=0.0)
    state.bad_words = ((1, 2), (2, 3))
    assert sample(logits.clone(), [state]).tokens == [3]
    state.output = [2]
    assert sample(logits.clone(), [state]).tokens == [2]


def test_masks_that_leave_nothing_are_ignored() -> None:
    state = row(temperature=0.0, min_tokens=1, stop_token_ids=(1,))
    assert sample(torch.tensor([[1.0, 2.0]]), [state]).tokens == [1]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    states = [row(temperature=0.0, logprobs=2, logit_bias={2: 50.0}), row(temperature=0.0)]
    found = sample(logits.clone(), states)
    assert found.tokens == [2, 2]
    entry = found.logprobs[0]
    assert entry is not None
    expected = logits[0].log_softmax(-1)
    assert entry.logprob == pytest.approx(float(expected[2]))
    assert entry.rank == 3
    assert [token for token, _ in entry.top] == [0, 1]
    assert found.logprobs[1] is None


def test_prompt_logprobs() -> None:
    logits = torch.randn(4, 9)
    targets = torch.tensor([3, 1, 8, 0])
    found = prompt_logprobs(logits, targets, 3)
    for index, entry in enumerate(found):
        logprobs = logits[index].log_softmax(-1)
        assert entry.logprob == pytest.approx(float(logprobs[targets[index]]))
        assert entry.rank == int((logprobs > logprobs[targets[index]]).sum()) + 1
        assert len(entry.top) == 3


def test_no_rows() -> None:
    assert sample(torch.empty(0, 5), []).tokens == []


@dataclass
class Bits:
    """A matcher of which only the mask is asked."""

    mask: np.ndarray


def bits(*tokens: int, words: int = 2) -> Bits:
    mask = np.zeros(words, dtype=np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return Bits(mask.view(np.int32))


@settings(max_examples=100, deadline=None)
@given(
    vocab=st.sampled_from([1, 31, 32, 40, 64]),
    rows=st.lists(
        st.tuples(OPTIONS, st.none() | st.sets(st.integers(0, 63), min_size=1)), max_size=5
    ),
    seed=st.integers(0, 10**6),
)
def test_masked_tokens_have_no_chance(
    vocab: int, rows: list[tuple[dict[str, object], set[int] | None]], seed: int
) -> None:
    """As if their logits had never been: the same token as from logits of minus infinity."""
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.standard_normal((len(rows), vocab)).astype(np.float32))
    expected = logits.clone()
    states = []
    for index, (options, allowed) in enumerate(rows):
        state = row(generator.integers(0, vocab, 2).tolist(), seed + index, **options)
        if allowed is not None:
            kept = {token for token in allowed if token < vocab} or {vocab - 1}
            state.matcher = bits(*kept)  # type: ignore[assignment]
            others = [token for token in range(vocab) if token not in kept]
            expected[index, others] = -math.inf
        states.append(state)
    found = {}
    for name in native.available():
        before = native.use(name)
        try:
            found[name] = sample(logits.clone(), states).tokens
            free = [replace(state, matcher=None) for state in states]
            assert sample(expected.clone(), free).tokens == found[name]
        finally:
            native.use(before)


def test_the_structure_wins_over_masks_and_biases() -> None:
    for options in (
        {"bad_words": True},
        {"logit_bias": {1: -1e30}},
        {"logit_bias": {2: 1e30}},
        {"min_tokens": 1, "stop_token_ids": (1,)},
    ):
        state = row(temperature=0.0, **{k: v for k, v in options.items() if k != "bad_words"})
        state.bad_words = ((1,),) if "bad_words" in options else ()
        state.matcher = bits(1, words=1)  # type: ignore[assignment]
        assert sample(torch.tensor([[3.0, 2.0, 9.0]]), [state]).tokens == [1]
