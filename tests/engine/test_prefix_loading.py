"""KV from files in the engine: the same tokens, and less to compute."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import PAGE_BYTES, pages_needed, random_requests, run, shared, tokens

from quire.decode.params import SamplingParams
from quire.engine import prefixes
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.errors import InvalidRequestError
from quire.kv.recipes import parse
from quire.kv.tiers.prefixes import BLOCK, Layout, PrefixFiles
from quire.schedule.policies import POLICIES
from toy import ByteTokenizer, MockModel


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "PIECE", 16)
    monkeypatch.setattr(prefixes, "LEAST", 4)


def files(folder: Path, key: str = "k") -> PrefixFiles:
    model = MockModel()
    spec = model.spec
    layout = Layout(len(spec.layers), spec.kv_heads, spec.head_dim, model.dtype)
    return PrefixFiles(folder, key, layout, 1 << 30)


RECIPES = [
    "none",
    "kivi(bits=4,residual=16,group=16)",
    "snapkv(budget=40,window=8)",
    "squeezed(window=8,keep=0.5,centroids=0.2)",
]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    policy=st.sampled_from(["batch", "fcfs"]),
    chunk=st.sampled_from([1, 7, 64, 512]),
    more=st.sampled_from([0, 3, 1000]),
    plain=st.booleans(),
)
def test_the_same_tokens_with_and_without(
    tmp_path_factory: pytest.TempPathFactory,
    seeds: tuple[int, int],
    policy: str,
    chunk: int,
    more: int,
    plain: bool,
) -> None:
    """Whatever an earlier run has left there, whole prompts or parts of them."""
    folder = tmp_path_factory.mktemp("kv")
    for seed in (*seeds, *seeds):
        requests = random_requests(seed)
        pages = max(map(pages_needed, requests)) + more
        options = {"policy": policy, "pages": pages, "chunk": chunk, "plain": plain}
        expected, _ = run(requests, **options)  # type: ignore[arg-type]
        kept = files(folder)
        found, _ = run(requests, files=kept, **options)  # type: ignore[arg-type]
        kept.close()
        assert tokens(found) == tokens(expected)
        assert kept.damaged == kept.dropped == 0
        scored = {key: result.prompt_logprobs for key, result in found.items()}
        assert {k: v is None for k, v in scored.items()} == {
            k: r.prompt_logprobs is None for k, r in expected.items()
        }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_second_run_computes_next_to_nothing(tmp_path: Path, recipe: str) -> None:
    requests = shared(3, 6, prefix=100, own=30)
    computed = []
    outputs = []
    for _ in range(2):
        kept = files(tmp_path)
        found, engine = run(requests, recipe=parse(recipe), files=kept)
        kept.close()
        counters = engine.world.counters
        computed.append(counters.prompt_computed)
        outputs.append(tokens(found))
        everything = 3 * (100 + 6 * 30)
        assert counters.prompt_computed + counters.prompt_loaded == everything
        assert counters.recomputed == counters.preemptions == 0
    assert outputs[0] == outputs[1]
    # The ends of private prompts are not kept, and SnapKV's window is computed.
    assert computed[1] <= 3 * 8 + 18 * 16
    assert computed[1] < computed[0] / 2


def test_prefixes_that_no_page_has_room_for(tmp_path: Path) -> None:
    """What was evicted is read again, not computed again."""
    documents = [[i] * 120 for i in range(1, 9)]
    requests = [
        EngineRequest(i, torch.tensor([*documents[i % 8], 50 + i]).int().numpy(), params, i)
        for i in range(24)
        for params in (SamplingParams(max_tokens=3, ignore_eos=True),)
    ]
    without, plain = run(requests, policy="fcfs", pages=30)
    kept = files(tmp_path)
    found, engine = run(requests, policy="fcfs", pages=30, files=kept)
    kept.close()
    assert tokens(found) == tokens(without)
    assert plain.world.counters.prompt_computed > 2 * 8 * 120
    assert engine.world.counters.prompt_computed < 8 * 130 + 24 * 10


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    requests = shared(1, 4, prefix=100)
    expected, _ = run(requests)
    for _ in range(3):
        for path in tmp_path.glob("*/*.kv"):
            path.write_bytes(path.read_bytes()[: BLOCK + 300])
        kept = files(tmp_path)
        found, engine = run(requests, files=kept)
        with pytest.warns(UserWarning, match="damaged") if kept.damaged else nullcontext():
            kept.close()
        assert tokens(found) == tokens(expected)
        assert engine.world.counters.prompt_loaded == 0
    assert kept.damaged > 0


def test_scored_prompts_are_computed(tmp_path: Path) -> None:
    requests = [
        EngineRequest(r.id, r.prompt, SamplingParams(max_tokens=2, prompt_logprobs=1), r.seed)
        for r in shared(1, 2)
    ]
    for _ in range(2):
        kept = files(tmp_path)
        found, engine = run(requests, files=kept)
        kept.close()
        assert engine.world.counters.prompt_loaded == 0
        assert all(
            len(r.prompt_logprobs or []) == len(requests[0].prompt) - 1 for r in found.values()
        )


@pytest.mark.parametrize("recipe", ["h2o", "mikv"])
def test_methods_that_must_see_everything_are_refused(tmp_path: Path, recipe: str) -> None:
    with pytest.raises(InvalidRequestError, match="looks at the attention of the whole prompt"):
        Engine(
            MockModel(),  # type: ignore[arg-type]
            ByteTokenizer(),  # type: ignore[arg-type]
            policy=POLICIES["batch"],
            kv_bytes=100 * PAGE_BYTES,
            chunk=64,
            recipe=parse(recipe),
            files=files(tmp_path),
        )
