"""The engine on a mock model: the same tokens whatever the policy, memory, chunk and order."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from quire.decode.params import SamplingParams
from quire.engine.engine import Engine
from quire.engine.limits import PAGE_TOKENS
from quire.engine.request import EngineRequest, EngineResult
from quire.errors import EngineStallError, PromptTooLongError
from quire.kv.method import Recipe
from quire.kv.recipes import parse
from quire.kv.tiers.prefixes import PrefixFiles
from quire.schedule.policies import POLICIES
from quire.schedule.state import Policy
from toy import ByteTokenizer, MockModel, spec

PAGE_BYTES = PAGE_TOKENS * 2 * 2 * 8 * 4


def pages_needed(request: EngineRequest) -> int:
    limit = request.params.max_tokens or 0
    return -(-len(request.prompt) // PAGE_TOKENS) + -(-limit // PAGE_TOKENS)


def run(
    requests: list[EngineRequest],
    *,
    policy: str = "batch",
    pages: int = 4000,
    chunk: int = 512,
    plain: bool = False,
    windows: int | None = None,
    model: MockModel | None = None,
    recipe: Recipe | None = None,
    files: PrefixFiles | None = None,
) -> tuple[dict[int, EngineResult], Engine]:
    """Run to the end, checking the pool after every step. ``windows``: requests added at first."""
    engine = Engine(
        model or MockModel(),  # type: ignore[arg-type]
        ByteTokenizer(),  # type: ignore[arg-type]
        policy=POLICIES[policy],
        kv_bytes=pages * PAGE_BYTES,
        chunk=chunk,
        eos_ids=(0,),
        plain=plain,
        recipe=recipe,
        files=files,
    )
    later = [] if windows is None else requests[windows:]
    engine.add(requests[:windows])
    found: dict[int, EngineResult] = {}
    for step in range(20000):
        if step == 2 or not engine.unfinished:
            engine.add(later)
            later = []
        if not engine.unfinished:
            break
        for result in engine.step():
            found[result.id] = result
        world = engine.world
        held = [n.segment for n in world.tree.resident.values() if n.segment]
        world.pool.check(held + [s.tail for s in world.state.running])
        assert world.pool.used_pages <= pages
    assert len(found) == len(requests), engine.describe()
    if policy == "batch":
        assert engine.world.pool.used_pages == 0
        assert not list(engine.world.tree.nodes())
    return found, engine


def pages_by_step(requests: list[EngineRequest], recipe: str) -> list[int]:
    """Pages in use after each step at whose end sequences ran."""
    engine = Engine(
        MockModel(),  # type: ignore[arg-type]
        ByteTokenizer(),  # type: ignore[arg-type]
        policy=POLICIES["batch"],
        kv_bytes=100 * PAGE_BYTES,
        chunk=64,
        recipe=parse(recipe),
    )
    engine.add(requests)
    used = []
    while engine.unfinished:
        engine.step()
        if engine.world.state.running:
            used.append(engine.world.pool.used_pages)
    return used


def tokens(found: dict[int, EngineResult]) -> dict[int, list[list[int]]]:
    return {key: [s.token_ids for s in result.samples] for key, result in found.items()}


def random_requests(seed: int) -> list[EngineRequest]:
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    requests = []
    for index in range(rng.randrange(1, 12)):
        if prompts and rng.random() < 0.7:
            known = rng.choice(prompts)
            prompt = known[: rng.randrange(1, len(known) + 1)]
            prompt = prompt + [rng.randrange(1, 256) for _ in range(rng.choice([0, 1, 5, 30]))]
        else:
            prompt = [rng.randrange(1, 256) for _ in range(rng.choice([1, 2, 17, 60]))]
        prompts.append(prompt[:150])
        params = SamplingParams(
            temperature=rng.choice([0, 0, 0.9]),
            max_tokens=rng.choice([1, 2, 20]),
            ignore_eos=rng.random() < 0.5,
            n=rng.choice([1, 1, 3]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
        )
        requests.append(EngineRequest(index, np.array(prompts[-1], dtype=np.int32), params, index))
    return requests


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(["batch", "fcfs"]),
    extra=st.sampled_from([0, 0, 1, 3, 50]),
    chunk=st.sampled_from([1, 3, 16, 64, 512]),
    order=st.integers(0, 10**6),
    windows=st.one_of(st.none(), st.integers(0, 12)),
)
def test_same_tokens_whatever_the_plan(
    seed: int, policy: str, extra: int, chunk: int, order: int, windows: int | None
) -> None:
    requests = random_requests(seed)
    expected, _ = run(requests, plain=True, chunk=10**6)
    random.Random(order).shuffle(requests)
    pages = max(map(pages_needed, requests)) + extra
    found, _ = run(requests, policy=policy, pages=pages, chunk=chunk, windows=windows)
    assert tokens(found) == tokens(expected)
    for key, result in found.items():
        scored, wanted = result.prompt_logprobs, expected[key].prompt_logprobs
        assert (scored is None) == (wanted is None)
        for mine, theirs in zip(scored or [], wanted or [], strict=True):
            assert mine.token == theirs.token
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_alone_or_in_company(seed: int) -> None:
    requests = random_requests(seed)
    together, _ = run(requests)
    for request in requests:
        alone, _ = run([request])
        assert tokens(alone)[request.id] == tokens(together)[request.id]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_sharing_on_or_off(seed: int) -> None:
    """Requests that score their prompt share it with no other request."""
    requests = random_requests(seed)
    private = [replace(r, params=replace(r.params, prompt_logprobs=0)) for r in requests]
    shared_tree, _ = run(requests)
    found, engine = run(private)
    assert tokens(found) == tokens(shared_tree)
    assert engine.world.counters.prompt_computed == sum(len(r.prompt) for r in requests)


def shared(groups: int, members: int, prefix: int = 64, own: int = 8) -> list[EngineRequest]:
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompts = []
    for _ in range(groups):
        head = rng.integers(1, 256, prefix)
        prompts += [np.concatenate([head, rng.integers(1, 256, own)]) for _ in range(members)]
    order = rng.permutation(len(prompts))
    return [EngineRequest(i, prompts[j].astype(np.int32), params, i) for i, j in enumerate(order)]


def test_every_shared_prefix_is_computed_once() -> None:
    model = MockModel()
    _, engine = run(shared(5, 10), model=model)
    counters = engine.world.counters
    assert counters.prompt_computed == 5 * 64 + 50 * 8
    assert counters.prompt_asked == 50 * 72
    assert model.tokens_seen == counters.prompt_computed + counters.output - 50
    assert counters.preemptions == counters.recomputed == 0


def test_batch_computes_less_than_fcfs_when_memory_is_short() -> None:
    requests = shared(12, 6)
    pages = 40
    _, batch = run(requests, pages=pages)
    _, fcfs = run(requests, policy="fcfs", pages=pages)
    assert batch.world.counters.prompt_computed == 12 * 64 + 72 * 8
    assert fcfs.world.counters.prompt_computed > 1.3 * batch.world.counters.prompt_computed


def test_groups_larger_than_memory_run_in_waves() -> None:
    requests = shared(1, 60)
    found, engine = run(requests, pages=12)
    assert len(found) == 60
    assert engine.world.counters.prompt_computed == 64 + 60 * 8


def test_samples_share_their_prompt() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=5, n=16, ignore_eos=True)
    prompt = np.arange(1, 101, dtype=np.int32)
    found, engine = run([EngineRequest(0, prompt, params, 7)])
    assert engine.world.counters.prompt_computed == 100
    assert len({tuple(s.token_ids) for s in found[0].samples}) > 8
    assert [s.index for s in found[0].samples] == list(range(16))


def test_cached_tokens_add_up() -> None:
    found, engine = run(shared(3, 4))
    cached = sum(result.cached_tokens for result in found.values())
    assert cached == engine.world.counters.prompt_asked - engine.world.counters.prompt_computed


def test_preemption_is_counted() -> None:
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    requests = [
        EngineRequest(i, rng.integers(1, 256, 20).astype(np.int32), params, i) for i in range(6)
    ]
    expected, _ = run(requests)
    found, engine = run(requests, policy="fcfs", pages=14)
    assert tokens(found) == tokens(expected)
    assert engine.world.counters.preemptions > 0
    assert engine.world.counters.recomputed > 0


def test_windowed_layers() -> None:
    requests = random_requests(3)
    expected, _ = run(requests, plain=True, model=MockModel(spec(window=9)))
    found, _ = run(requests, chunk=7, model=MockModel(spec(window=9)))
    other, _ = run(requests)
    assert tokens(found) == tokens(expected)
    assert tokens(found) != tokens(other)


def test_stop_strings_cut_the_text() -> None:
    free = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    prompt = np.array([65, 66, 67], dtype=np.int32)
    found, _ = run([EngineRequest(0, prompt, free, 0)])
    output = found[0].samples[0]
    printable = [i for i, t in enumerate(output.token_ids) if 0 < t < 128]
    at = next(i for i in printable if i > 2 and output.token_ids.index(output.token_ids[i]) == i)
    stop = chr(output.token_ids[at])
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=(stop,))
    cut, _ = run([EngineRequest(0, prompt, params, 0)])
    sample = cut[0].samples[0]
    assert sample.finish_reason == "stop"
    assert sample.token_ids == output.token_ids[: at + 1]
    assert stop not in sample.text
    assert output.text.startswith(sample.text)


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    engine = Engine(
        MockModel(),  # type: ignore[arg-type]
        None,
        policy=POLICIES["batch"],
        kv_bytes=3 * PAGE_BYTES,
        chunk=16,
    )
    assert engine.limits.output_tokens(16, 32) == 32
    with pytest.raises(PromptTooLongError, match="need 8,192 bytes of KV; the pool has 6,144"):
        engine.limits.output_tokens(17, 32)
    with pytest.raises(PromptTooLongError, match="512 tokens; the context holds 512"):
        engine.limits.output_tokens(512, 1)


def test_a_policy_that_does_nothing_is_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.schedule.state import StepPlan

    monkeypatch.setattr("quire.engine.world.plan_step", lambda _state, _policy: StepPlan())
    engine = Engine(
        MockModel(),  # type: ignore[arg-type]
        None,
        policy=POLICIES["batch"],
        kv_bytes=99 * PAGE_BYTES,
        chunk=16,
    )
    engine.add(shared(1, 2))
    with pytest.raises(EngineStallError, match="0 running, 2 waiting"):
        engine.step()


def test_abort_gives_everything_back() -> None:
    engine = Engine(
        MockModel(),  # type: ignore[arg-type]
        None,
        policy=POLICIES["batch"],
        kv_bytes=999 * PAGE_BYTES,
        chunk=48,
    )
    engine.add(shared(2, 5))
    for _ in range(3):
        engine.step()
    engine.abort_all()
    assert engine.world.pool.used_pages == 0
    assert not list(engine.world.tree.nodes())
    assert engine.unfinished == 0


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(["batch", "fcfs"]),
    steps=st.integers(0, 12),
    started=st.booleans(),
)
def test_withdrawn_requests_leave_nothing_behind(
    seed: int, policy: str, steps: int, started: bool
) -> None:
    """Whether they had started or not; added again, they get the same tokens."""
    rng = random.Random(seed)
    requests = random_requests(seed)
    expected, _ = run(requests)
    engine = Engine(
        MockModel(),  # type: ignore[arg-type]
        ByteTokenizer(),  # type: ignore[arg-type]
        policy=POLICIES[policy],
        kv_bytes=(max(map(pages_needed, requests)) + 3) * PAGE_BYTES,
        chunk=16,
        eos_ids=(0,),
    )
    engine.add(requests)
    found = {result.id: result for _ in range(steps) for result in step(engine)}
    choice = [r.id for r in requests if r.id not in found] if started else engine.not_started()
    withdrawn = rng.sample(choice, rng.randrange(len(choice) + 1))
    engine.withdraw(withdrawn)
    assert engine.unfinished == len(requests) - len(found) - len(withdrawn)
    if rng.random() < 0.5:
        engine.add(r for r in requests if r.id in withdrawn)
        withdrawn = []
    while engine.unfinished:
        found.update({result.id: result for result in step(engine)})
    assert set(found) == {r.id for r in requests} - set(withdrawn)
    assert tokens(found) == {k: v for k, v in tokens(expected).items() if k in found}
    if policy == "batch":
        assert engine.world.pool.used_pages == 0
        assert not list(engine.world.tree.nodes())


def step(engine: Engine) -> list[EngineResult]:
    """One step, if there is anything to do, and a look at the pool."""
    results = engine.step() if engine.unfinished else []
    world = engine.world
    held = [node.segment for node in world.tree.resident.values() if node.segment]
    world.pool.check(held + [seq.tail for seq in world.state.running])
    return results


def test_not_started_requests_come_in_their_order() -> None:
    engine = Engine(
        MockModel(),  # type: ignore[arg-type]
        None,
        policy=POLICIES["fcfs"],
        kv_bytes=999 * PAGE_BYTES,
        chunk=40,
    )
    requests = random_requests(5) + shared(1, 9)
    engine.add([replace(r, id=i) for i, r in enumerate(requests)])
    left = engine.not_started()
    assert left == list(range(len(requests)))
    while left:
        engine.step()
        now = engine.not_started()
        assert now == left[len(left) - len(now) :]
        left = now


def test_policies_are_plain_data() -> None:
    assert all(isinstance(policy, Policy) for policy in POLICIES.values())
    assert torch.is_tensor(MockModel().embedding)
