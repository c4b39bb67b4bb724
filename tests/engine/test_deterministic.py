"""Deterministic mode: a request's numbers are the same bits whatever it is batched with."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from instruction_sets import NAMES, threads, using

from quire.bench.shapes import make_checkpoint
from quire.decode.params import SamplingParams
from quire.engine.engine import Engine
from quire.engine.limits import PAGE_TOKENS
from quire.engine.request import EngineRequest, EngineResult
from quire.errors import InvalidRequestError
from quire.kv import recipes
from quire.kv.arena import token_bytes
from quire.models.blocks import MLP
from quire.models.decoder import Decoder
from quire.models.loader import load_model
from quire.schedule.policies import POLICIES
from quire.weights.dense import DenseProduct
from quire.weights.linear import Linear
from quire.weights.quantise import parse
from toy import MockModel

# What a request's answer is compared by: tokens and the log-probabilities of each, as they are.
Answer = list[tuple[list[int], object]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with heads of 16, random weights, bfloat16: many logits lie close together."""
    return make_checkpoint("tiny", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Decoder:
    return load_model(checkpoint, deterministic=True)


def page_bytes(model: Decoder) -> int:
    spec = model.spec
    return PAGE_TOKENS * token_bytes(len(spec.layers), spec.kv_heads, spec.head_dim, model.dtype)


def run(
    model: Decoder,
    requests: list[EngineRequest],
    *,
    policy: str = "batch",
    pages: int = 2000,
    chunk: int = 512,
    later: int | None = None,
    deterministic: bool = True,
    kv: str = "none",
) -> tuple[dict[int, Answer], Engine]:
    """Run to the end. ``later``: requests after the first so many come after two steps."""
    engine = Engine(
        model,
        None,
        policy=POLICIES[policy],
        kv_bytes=pages * page_bytes(model),
        chunk=chunk,
        deterministic=deterministic,
        recipe=recipes.parse(kv),
    )
    found: dict[int, EngineResult] = {}
    engine.add(requests[:later])
    rest = [] if later is None else requests[later:]
    for step in range(10000):
        if step == 2:
            engine.add(rest)
        if not engine.unfinished and step > 2:
            break
        found |= {result.id: result for result in engine.step()}
    assert len(found) == len(requests)
    answers: dict[int, Answer] = {
        key: [(s.token_ids, s.logprobs) for s in result.samples] for key, result in found.items()
    }
    return answers, engine


def make_requests(seed: int, count: int = 9) -> list[EngineRequest]:
    """Prompts that share prefixes of many lengths; greedy and sampled, some with two samples."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    requests = []
    for index in range(count):
        start: list[int] = []
        if prompts and rng.random() < 0.75:
            known = rng.choice(prompts)
            start = known[: rng.randrange(1, len(known) + 1)]
        more = rng.choice([0, 1, 15, 40, 130]) if start else rng.choice([1, 17, 90])
        prompts.append([*start, *(rng.randrange(3, 512) for _ in range(more))])
        params = SamplingParams(
            temperature=[0.0, 1.0][index % 2],
            max_tokens=rng.choice([1, 6, 20, 30]),
            ignore_eos=True,
            n=2 if index % 4 == 3 else 1,
            logprobs=3,
        )
        prompt = np.array(prompts[-1], dtype=np.int32)
        requests.append(EngineRequest(index, prompt, params, seed + index))
    return requests


def alone(model: Decoder, requests: list[EngineRequest]) -> dict[int, Answer]:
    found: dict[int, Answer] = {}
    for request in requests:
        found |= run(model, [request])[0]
    return found


def least_pages(requests: list[EngineRequest]) -> int:
    return max(
        -(-len(r.prompt) // PAGE_TOKENS) + -(-(r.params.max_tokens or 0) // PAGE_TOKENS)
        for r in requests
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_same_bits_whatever_the_batch(model: Decoder, seed: int) -> None:
    requests = make_requests(seed)
    expected = alone(model, requests)
    together, engine = run(model, requests)
    assert together == expected
    counters = engine.world.counters
    assert counters.prompt_computed < counters.prompt_asked, "prefixes are shared"
    shuffled = random.Random(seed).sample(requests, len(requests))
    for options in (
        {"policy": "fcfs"},
        {"chunk": 7},
        {"chunk": 64, "later": 4},
        {"policy": "fcfs", "chunk": 33, "later": 2},
        {"pages": least_pages(requests)},
        {"policy": "fcfs", "pages": least_pages(requests) + 3, "chunk": 50},
    ):
        found, _ = run(model, shuffled, **options)  # type: ignore[arg-type]
        assert found == expected, options


def test_same_bits_after_preemption(model: Decoder) -> None:
    """Tokens that were decoded one by one are computed again as one chunk."""
    rng = np.random.default_rng(1)
    requests = [
        EngineRequest(
            i,
            rng.integers(3, 512, 20).astype(np.int32),
            SamplingParams(temperature=i % 2 * 1.0, max_tokens=60, ignore_eos=True, logprobs=1),
            i,
        )
        for i in range(6)
    ]
    found, engine = run(model, requests, policy="fcfs", pages=14)
    assert engine.world.counters.preemptions > 0
    assert found == alone(model, requests)


@pytest.mark.parametrize(
    "kv",
    [
        "streaming(budget=20)",
        "snapkv(budget=24,window=8)",
        "h2o(budget=24)",
        "scissorhands(budget=24,window=8)",
        "prefixkv(budget=24)",
        "elastic(budget=24)",
        "kvmerger(budget=24)",
        "chelsea(budget=24)",
        "gemfilter(layer=1,budget=24)",
    ],
)
def test_same_tokens_with_a_selection(model: Decoder, kv: str) -> None:
    requests = make_requests(5)
    expected: dict[int, Answer] = {}
    for request in requests:
        expected |= run(model, [request], kv=kv)[0]
    assert expected != alone(model, requests), "something is dropped"
    for options in ({}, {"policy": "fcfs", "chunk": 33, "later": 2}, {"chunk": 7}):
        found, _ = run(model, requests, kv=kv, **options)  # type: ignore[arg-type]
        assert found == expected, options


@pytest.mark.parametrize("kv", ["kivi", "landmarks", "pbs", "snapkv+int8"])
def test_methods_that_see_the_tree_are_refused(model: Decoder, kv: str) -> None:
    with pytest.raises(InvalidRequestError, match="other requests") as info:
        run(model, make_requests(1, 1), kv=kv)
    assert info.value.field == "kv"
    run(model, make_requests(1, 1), kv=kv, deterministic=False)


def test_same_bits_on_two_threads(model: Decoder) -> None:
    requests = make_requests(3)
    expected, _ = run(model, requests)
    torch.set_num_threads(2)
    try:
        with threads(2):
            assert run(model, requests)[0] == expected
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", [None, "int8", "int4:32", "int4:64+zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_formats_and_instruction_sets(
    checkpoint: Path, name: str, weights: str | None, dtype: torch.dtype
) -> None:
    with using(name):
        asked = None if weights is None else parse(weights)
        model = load_model(checkpoint, dtype=dtype, weights=asked, deterministic=True)
        requests = make_requests(4, 6)
        expected = alone(model, requests)
        assert run(model, requests)[0] == expected
        assert run(model, requests[::-1], chunk=13, policy="fcfs")[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "family",
    "gemma2 gemma3 llama-dynamic mistral mixtral olmo2 phi4-partial pythia qwen3-moe".split(),
)
def test_architectures(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families = pytest.importorskip("families")
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}  # 16 wide
    monkeypatch.setattr(families, "BASE", families.BASE | heads)
    families.make(family, tmp_path)
    model = load_model(tmp_path, dtype=dtype, deterministic=True)
    requests = [
        replace(r, prompt=r.prompt[:200] % 120 + 3)
        for seed in (4, 5)
        for r in make_requests(seed, 6)
    ]
    requests = [replace(r, id=index) for index, r in enumerate(requests)]
    expected = alone(model, requests)
    assert run(model, requests)[0] == expected
    assert run(model, requests[::-1], chunk=13, policy="fcfs")[0] == expected


def test_activation_without_a_gate() -> None:
    """PyTorch's own would not do: it computes whole vectors and the numbers left over in two ways.

    They differ in the last bit for this activation, and which one a number of a row falls to
    depends on the rows before it (where the width is no multiple of 16) and on the threads.
    """
    torch.manual_seed(0)
    same = Linear(DenseProduct.make(torch.eye(72)))
    mlp = MLP(same, same, "gelu_new", gated=False)
    x = torch.randn(99, 72)
    whole = mlp(x)
    for row in range(99):
        assert torch.equal(mlp(x[row : row + 1]), whole[row : row + 1])


def test_prompt_logprobs_are_the_same_bits(model: Decoder) -> None:
    """Every position's log-probabilities, in chunks of several sizes and in company."""
    requests = [
        replace(r, params=replace(r.params, prompt_logprobs=2, logprobs=None))
        for r in make_requests(5)
    ]

    def scores(chunk: int, batch: list[EngineRequest]) -> Iterator[tuple[int, object]]:
        engine = Engine(
            model,
            None,
            policy=POLICIES["batch"],
            kv_bytes=2000 * page_bytes(model),
            chunk=chunk,
            deterministic=True,
        )
        engine.add(batch)
        while engine.unfinished:
            for result in engine.step():
                yield result.id, result.prompt_logprobs

    expected = {i: s for r in requests for i, s in scores(512, [r])}
    assert any(expected.values())
    for chunk in (3, 50, 2000):
        assert dict(scores(chunk, requests)) == expected


def test_without_it_the_bits_differ(model: Decoder) -> None:
    """The tests above can fail: the usual sums depend on the batch in their last bits."""
    requests = make_requests(1)
    together, _ = run(model, requests, deterministic=False)
    expected: dict[int, Answer] = {}
    for request in requests:
        expected |= run(model, [request], deterministic=False)[0]
    assert together != expected


def test_what_it_needs(model: Decoder) -> None:
    options = {"policy": POLICIES["batch"], "kv_bytes": 1 << 20, "chunk": 16}
    with pytest.raises(InvalidRequestError, match="multiple of 16 up to 256 wide") as info:
        Engine(MockModel(), None, deterministic=True, **options)  # type: ignore[arg-type]
    assert info.value.field == "deterministic"
    with using("plain"), pytest.raises(InvalidRequestError, match="needs the native CPU kernels"):
        Engine(model, None, deterministic=True, **options)  # type: ignore[arg-type]
    Engine(model, None, deterministic=True, **options)  # type: ignore[arg-type]
