"""All layers in one native call give the same bits as one kernel at a time."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from instruction_sets import NAMES, threads, using

from quire.decode.params import SamplingParams
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.engine.world import Work
from quire.kv.method import Recipe
from quire.kv.store.affine import Kivi
from quire.models.decoder import Decoder
from quire.models.loader import load_model
from quire.schedule.policies import POLICIES
from quire.weights.quantise import parse

FUSED = {
    "llama": {},
    "llama-tied-biased": {},
    "llama3": {},
    "mistral": {},
    "qwen2": {},
    "qwen2-window": {},
    "qwen3": {},
    "qwen3-biased": {},
    "phi3": {},
    "phi4-partial": {"head_dim": 16},
    "smollm3-window": {},
}
NOT_FUSED = ["gemma2", "olmo2", "pythia", "mixtral", "qwen3-moe-mixed"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models whose heads, of 16 numbers, the kernels can attend with."""
    families = pytest.importorskip("families")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
        patch.setattr(families, "BASE", families.BASE | sizes | {"intermediate_size": 96})
        for name in [*FUSED, *NOT_FUSED]:
            found[name] = tmp_path_factory.mktemp(name)
            families.make(name, found[name])
    return found


def make_engine(model: Decoder, chunk: int, *, deterministic: bool = False) -> Engine:
    return Engine(
        model,
        None,
        policy=POLICIES["batch"],
        kv_bytes=1 << 22,
        chunk=chunk,
        deterministic=deterministic,
    )


def make_requests(seed: int, count: int) -> list[EngineRequest]:
    """Some prompts share prefixes; each decodes a few tokens."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 120) for _ in range(40)]
    requests = []
    for index in range(count):
        start = shared[: rng.choice([0, 16, 23, 40])]
        prompt = np.array(start + [rng.randrange(3, 120) for _ in range(rng.randint(1, 30))])
        params = SamplingParams(temperature=0, max_tokens=rng.randint(2, 5), ignore_eos=True)
        requests.append(EngineRequest(index, prompt.astype(np.int32), params, index))
    return requests


def hidden_states(engine: Engine, requests: list[EngineRequest]) -> tuple[list[Tensor], list[int]]:
    """Those wanted of every step, to the end, and how many tokens each step computes."""
    found: list[Tensor] = []
    tokens: list[int] = []
    forward = engine.runner.forward

    def record(works: Sequence[Work], wanted: Sequence[int]) -> Tensor:
        tokens.append(sum(work.item.count for work in works))
        found.append(forward(works, wanted))
        return found[-1]

    engine.runner.forward = record  # type: ignore[method-assign]
    engine.add(requests)
    while engine.unfinished:
        engine.step()
    return found, tokens


def check(model: Decoder, *, count: int, chunk: int, deterministic: bool = False) -> list[int]:
    """Both ways, bit by bit; the number of tokens of each step."""
    fused = make_engine(model, chunk, deterministic=deterministic)
    plain = make_engine(model, chunk, deterministic=deterministic)
    assert fused.runner.fused is not None
    plain.runner.fused = None
    steps, tokens = hidden_states(fused, make_requests(count, count))
    expected, same_tokens = hidden_states(plain, make_requests(count, count))
    assert tokens == same_tokens
    assert all(torch.isfinite(s).all() for s in steps)
    assert all(torch.equal(a, b) for a, b in zip(steps, expected, strict=True))
    return tokens


@DTYPES
@pytest.mark.parametrize("name", FUSED)
def test_architectures(checkpoints: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    model = load_model(checkpoints[name], dtype=dtype)
    rows = check(model, count=1, chunk=64) + check(model, count=12, chunk=70)
    assert min(rows) == 1
    assert max(rows) == 70


@DTYPES
@pytest.mark.parametrize("weights", [None, "int8", "int4:32", "int4:32+zeros"])
@pytest.mark.parametrize("isa", NAMES)
def test_formats_and_instruction_sets(
    checkpoints: dict[str, Path], isa: str, weights: str | None, dtype: torch.dtype
) -> None:
    with using(isa):
        asked = None if weights is None else parse(weights)
        model = load_model(checkpoints["llama-tied-biased"], dtype=dtype, weights=asked)
        assert 1 in check(model, count=1, chunk=13)
        check(model, count=9, chunk=70)


@pytest.mark.parametrize("weights", [None, "int8", "int4:32"])
def test_deterministic_and_two_threads(checkpoints: dict[str, Path], weights: str | None) -> None:
    asked = None if weights is None else parse(weights)
    model = load_model(
        checkpoints["qwen3"], dtype=torch.bfloat16, weights=asked, deterministic=True
    )
    check(model, count=8, chunk=40, deterministic=True)
    with threads(2):
        check(model, count=8, chunk=40, deterministic=True)
        check(model, count=8, chunk=40)


@pytest.mark.parametrize("name", NOT_FUSED)
def test_other_layers_run_one_by_one(checkpoints: dict[str, Path], name: str) -> None:
    assert make_engine(load_model(checkpoints[name]), 64).runner.fused is None


def test_what_else_runs_one_by_one(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["llama"])
    engine = Engine(
        model,
        None,
        policy=POLICIES["batch"],
        kv_bytes=1 << 22,
        chunk=64,
        recipe=Recipe(store=Kivi()),
    )
    assert engine.runner.fused is None
    with using("plain"):
        assert make_engine(load_model(checkpoints["llama"]), 64).runner.fused is None
