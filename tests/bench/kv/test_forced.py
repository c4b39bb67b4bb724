from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from quire.bench.kv.forced import Forced, Script, Span, divergence
from quire.decode.params import SamplingParams
from quire.engine.engine import Engine
from quire.engine.limits import PAGE_TOKENS
from quire.engine.request import EngineRequest, EngineResult
from quire.kv.method import Recipe
from quire.kv.recipes import parse
from quire.schedule.policies import POLICIES
from toy import ByteTokenizer, MockModel

PAGE_BYTES = PAGE_TOKENS * 2 * 2 * 8 * 4


def engine(kind: type[Engine], recipe: Recipe | None = None, pages: int = 500) -> Engine:
    return kind(
        MockModel(),  # type: ignore[arg-type]
        ByteTokenizer(),  # type: ignore[arg-type]
        policy=POLICIES["batch"],
        kv_bytes=pages * PAGE_BYTES,
        chunk=64,
        recipe=recipe,
    )


def forced(scripts: list[Script], recipe: Recipe | None = None, pages: int = 500) -> list:
    found = engine(Forced, recipe, pages)
    assert isinstance(found, Forced)
    return found.follow(scripts)


def run(request: EngineRequest) -> EngineResult:
    plain = engine(Engine)
    plain.add([request])
    while plain.unfinished:
        for result in plain.step():
            return result
    raise AssertionError


def numbers(rng: random.Random, count: int) -> np.ndarray:
    return np.array([rng.randrange(1, 256) for _ in range(count)], dtype=np.int32)


def random_script(rng: random.Random, shared: np.ndarray) -> Script:
    prompt = np.concatenate([shared, numbers(rng, rng.randrange(1, 40))])
    given = numbers(rng, rng.randrange(1, 60))
    cuts = sorted(rng.sample(range(len(given) + 1), k=min(len(given) + 1, rng.choice([2, 4]))))
    spans = tuple(
        Span(a, b, tuple(int(t) for t in numbers(rng, 3)))
        for a, b in zip(cuts[::2], cuts[1::2], strict=False)
    )
    return Script(prompt, given, spans, spread=rng.random() < 0.5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), pages=st.sampled_from([30, 500]))
def test_log_probabilities_are_those_of_a_prompt(seed: int, pages: int) -> None:
    rng = random.Random(seed)
    shared = numbers(rng, rng.choice([0, 50]))
    scripts = [random_script(rng, shared) for _ in range(3)]
    for script, heard in zip(scripts, forced(scripts, pages=pages), strict=True):
        whole = np.concatenate([script.prompt, script.given])
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        scored = run(EngineRequest(0, whole, params, 0)).prompt_logprobs
        assert scored is not None
        for span, mine in zip(script.spans, heard, strict=True):
            first = len(script.prompt) - 1
            wanted = scored[first + span.start : first + span.stop]
            assert mine.logprobs == pytest.approx([w.logprob for w in wanted], abs=1e-3)
            for rank, entry in zip(mine.ranks, wanted, strict=True):
                assert abs(rank - entry.rank) <= 1  # two tokens may be as likely but for rounding
            assert mine.tops == [w.top[0][0] for w in wanted]
            assert mine.exact == all(rank == 1 for rank in mine.ranks)
            assert len(mine.spreads) == (len(wanted) if script.spread else 0)
            for spread in mine.spreads:
                assert float(spread.exp().sum()) == pytest.approx(1, abs=1e-4)
            if script.spread and wanted:
                best = max(span.choices, key=lambda token, m=mine: float(m.spreads[0][token]))
                assert mine.chosen is not None
                assert span.choices[mine.chosen] == best


@pytest.mark.parametrize("text", ["none", "snapkv(budget=16,window=4)", "kivi(bits=2,residual=32)"])
def test_exact_is_what_greedy_decoding_writes(text: str) -> None:
    recipe = parse(text)
    prompt = numbers(random.Random(1), 70)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    plain = engine(Engine, recipe)
    plain.add([EngineRequest(0, prompt, params, 0)])
    results: list[EngineResult] = []
    while plain.unfinished:
        results += plain.step()
    written = np.array(results[0].samples[0].token_ids, dtype=np.int32)
    spans = (Span(0, 20),)
    ((right,),) = forced([Script(prompt, written, spans)], recipe)
    assert right.exact
    assert right.tops == written.tolist()
    wrong = written.copy()
    wrong[12] = written[12] % 255 + 1
    ((heard,),) = forced([Script(prompt, wrong, spans)], recipe)
    assert not heard.exact
    assert heard.tops[:13] == written[:13].tolist()


def test_the_token_before_a_span_is_decoded_alone() -> None:
    class Watching(Forced):
        def step(self) -> list[EngineResult]:
            before = {seq.id: seq.tail.length for seq in self.world.state.running}
            done = super().step()
            for seq in self.world.state.running:
                counts.append(seq.tail.length - before.get(seq.id, 0))
            return done

    counts: list[int] = []
    found = engine(Watching)
    assert isinstance(found, Forced)
    rng = random.Random(0)
    found.follow([Script(numbers(rng, 10), numbers(rng, 30), (Span(0, 2), Span(20, 22)))])
    # The first answer; 17 tokens at once; the last before the second answer; and that answer.
    assert [count for count in counts if count] == [1, 1, 17, 1, 1, 1]


@given(seed=st.integers(0, 1000))
def test_divergence(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 50, generator=generator).log_softmax(-1)
    assert divergence(p, p) == 0
    wanted = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    assert divergence(p, q) == pytest.approx(float(wanted), rel=1e-4)
