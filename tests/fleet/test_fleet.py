"""A fleet gives what one `LLM` gives, however many workers there are and whatever happens to them.

Workers live in this process here; test_processes.py and test_actors.py let them live elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quire import LLM, RequestOutput, SamplingParams
from quire.errors import InvalidRequestError, PromptTooLongError
from quire.fleet.fleet import Fleet, count_workers, llm_options, make_setup
from quire.fleet.messages import Command, Died, Message, Start
from quire.fleet.worker import Worker
from tests.fleet.conftest import OPTIONS


class Inside:
    """Workers in this process, by turns. ``dies``: how likely one does instead of a report."""

    def __init__(self, options: dict[str, Any], dies: float = 0.0) -> None:
        self._options = options
        self._dies = dies
        self._rng = random.Random(1)
        self._workers: dict[int, Worker] = {}
        self._orders: dict[int, Command] = {}

    def send(self, worker: int, command: Command) -> None:
        assert worker not in self._orders
        self._orders[worker] = command

    def wait(self, seconds: float) -> list[tuple[int, Message]]:
        del seconds
        if not self._orders:
            return []
        worker = self._rng.choice(sorted(self._orders))
        command = self._orders.pop(worker)
        if isinstance(command, Start):
            self._workers[worker] = Worker()
            return [(worker, self._workers[worker].start(self._options))]
        report = self._workers[worker].advance(command)
        return [(worker, Died("a test") if self._rng.random() < self._dies else report)]

    def close(self) -> None:
        self._workers.clear()


def make(model: Path, workers: int, dies: float = 0.0, **options: Any) -> Fleet:
    full = llm_options(model=model, **OPTIONS | options)
    setup = make_setup(full)
    return Fleet(Inside(full, dies), workers, full, lambda _: setup, lambda _: None)


@pytest.fixture(autouse=True)
def _short_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.fleet.worker.ADVANCE_SECONDS", 0.01)


def rows(count: int) -> Iterator[tuple[Any, SamplingParams]]:
    """Greedy and sampled, one and several samples, shared prefixes, scores, and bad ones."""
    for i in range(count):
        story = f"Once upon a time there was a {('dog', 'cat', 'king')[i % 3]} who said {i % 7}"
        params = SamplingParams(
            temperature=0.0 if i % 4 == 0 else 0.9,
            n=1 + 2 * (i % 5 == 0),
            max_tokens=1 + i % 23,
            seed=i if i % 6 == 0 else None,
            prompt_logprobs=0 if i % 11 == 0 else None,
        )
        yield ("" if i == 17 else {"a": 1} if i == 18 else "x " * 600 if i == 19 else story), params


def tokens(outputs: list[RequestOutput]) -> list[Any]:
    """What must not depend on the workers, in the order of the input."""
    ordered = sorted(outputs, key=lambda o: o.request_id)
    assert [o.request_id for o in ordered] == list(range(len(ordered)))
    return [
        (type(o.error), o.prompt_token_ids, [(s.token_ids, s.text) for s in o.outputs])
        for o in ordered
    ]


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[Any]:
    with LLM(tiny, **OPTIONS) as llm:
        return tokens(list(llm.generate_iter(rows(120))))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("window", [7, 32768])
def test_the_number_of_workers_changes_nothing(
    tiny: Path, expected: list[Any], workers: int, window: int
) -> None:
    with make(tiny, workers, window=window) as fleet:
        assert tokens(list(fleet.generate_iter(rows(120)))) == expected
        assert fleet.stats.running == fleet.stats.waiting == 0


def test_deaths_change_nothing(tiny: Path, expected: list[Any]) -> None:
    with make(tiny, 2, dies=0.05) as fleet:
        assert tokens(list(fleet.generate_iter(rows(120)))) == expected


def test_several_calls_and_one_left_early(tiny: Path, expected: list[Any]) -> None:
    with make(tiny, 2) as fleet:
        found = fleet.generate_iter(rows(120))
        next(found)
        next(found)
        found.close()
        for _ in range(2):
            assert tokens(list(fleet.generate_iter(rows(120)))) == expected


def test_stats_are_sums_that_grow(tiny: Path) -> None:
    steps: list[int] = []
    with make(tiny, 2) as fleet:
        outputs = list(
            fleet.generate_iter(rows(60), on_step=lambda stats: steps.append(stats.output_tokens))
        )
        stats = fleet.stats
    assert steps == sorted(steps)
    assert stats.output_tokens == sum(len(s.token_ids) for o in outputs for s in o.outputs)
    good = [o for o in outputs if o.error is None]
    asked = sum(len(o.prompt_token_ids) * len(o.outputs) for o in good)
    assert stats.prompt_tokens == asked
    assert 0 < stats.computed_tokens < asked
    assert 0.9 * (32 << 20) < stats.kv_bytes <= 32 << 20


def test_no_rows(tiny: Path) -> None:
    with make(tiny, 2) as fleet:
        assert list(fleet.generate_iter([])) == []


def test_an_overlong_prompt_may_be_fatal(tiny: Path) -> None:
    with make(tiny, 1, on_overlong="fail") as fleet, pytest.raises(PromptTooLongError):
        list(fleet.generate_iter([("x " * 600, SamplingParams())]))


def test_options_are_those_of_llm() -> None:
    with pytest.raises(TypeError, match="windows"):
        llm_options(windows=3)
    assert llm_options(chunk=7)["chunk"] == 7


def test_numbers_of_workers() -> None:
    assert [count_workers(w, 5) for w in ("auto", "3", 2)] == [5, 3, 2]
    for wrong in ("0", "-1", "many", "2.5", 0):
        with pytest.raises(InvalidRequestError, match="Give a number from 1, or auto"):
            count_workers(wrong, 5)
