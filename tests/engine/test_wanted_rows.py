"""The last layer computes the wanted rows only, and they are what they are among all rows."""

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

import families
from instruction_sets import using

from quire.attention.segments import last_rows
from quire.decode.params import SamplingParams
from quire.engine import fused
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.engine.world import Work
from quire.models.loader import load_model
from quire.schedule.policies import POLICIES


def requests(count: int) -> list[EngineRequest]:
    """Prompts that share prefixes, some as long as several steps."""
    rng = np.random.default_rng(count)
    shared = rng.integers(3, 60, 40)
    found = []
    for index in range(count):
        prompt = np.concatenate([shared[: 13 * (index % 4)], rng.integers(3, 60, 1 + 7 * index)])
        params = SamplingParams(
            temperature=0,
            max_tokens=4,
            ignore_eos=True,
            prompt_logprobs=1 if index == 2 else None,
        )
        found.append(EngineRequest(index, prompt.astype(np.int32), params, 0))
    return found


def make_engine(folder: Path, *, same_bits: bool = False, plain: bool = False) -> Engine:
    return Engine(
        load_model(folder, dtype=torch.float32),
        None,
        policy=POLICIES["batch"],
        kv_bytes=1 << 21,
        chunk=40,
        deterministic=same_bits,
        plain=plain,
    )


def check(folder: Path, *, same_bits: bool = False, plain: bool = False) -> Engine:
    """Each step four times: all rows, none, any few of them, and those that the engine wants."""
    engine = make_engine(folder, same_bits=same_bits, plain=plain)
    forward = engine.runner.forward
    rng = random.Random(1)
    sizes = set()

    def again_and_again(works: Sequence[Work], wanted: Sequence[int]) -> Tensor:
        items = [work.item for work in works]
        expected = forward(works)
        few = [rng.randint(0, item.count) for item in items]
        for counts in ([0] * len(items), few, wanted):
            found = forward(works, counts)
            rows = expected[last_rows(items, counts)[1]]
            assert found.shape == rows.shape
            sizes.add(len(rows))
            if same_bits:
                assert torch.equal(found, rows)
            torch.testing.assert_close(found, rows, rtol=0, atol=2e-5)
        return found

    engine.runner.forward = again_and_again  # type: ignore[method-assign]
    engine.add(requests(7))
    while engine.unfinished:
        engine.step()
    assert {0, 1} < sizes
    return engine


@pytest.mark.parametrize("name", families.MODELS)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    families.make(name, tmp_path)
    check(tmp_path)


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose heads the native kernels can attend with."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    monkeypatch.setattr(families, "BASE", families.BASE | sizes)
    families.make("qwen3", tmp_path)
    return tmp_path


def test_in_one_call_with_the_same_bits(wide: Path) -> None:
    assert check(wide).runner.fused is not None
    check(wide, same_bits=True)


def test_without_kernels_and_by_the_reference(wide: Path) -> None:
    with using("plain"):
        check(wide)
        check(wide, plain=True)


def test_with_no_row_wanted_the_last_layer_is_left_out(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer, in which a layer adds its results to its input, tells whether it ran."""
    left: list[Tensor] = []
    run_layers = fused.run_layers

    def watched(weights: object, x: Tensor, *others: object) -> None:
        run_layers(weights, x, *others)  # type: ignore[arg-type]
        left.append(x.clone())

    monkeypatch.setattr(fused, "run_layers", watched)
    engine = make_engine(wide)
    forward = engine.runner.forward

    def twice(works: Sequence[Work], wanted: Sequence[int]) -> Tensor:
        forward(works, [0] * len(works))
        return forward(works)[last_rows([work.item for work in works], wanted)[1]]

    engine.runner.forward = twice  # type: ignore[method-assign]
    engine.add(requests(3))
    engine.step()
    none, every = left
    assert none.shape == every.shape
    assert not (none == every).all(dim=1).any()
