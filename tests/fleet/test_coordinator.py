"""The coordinator on simulated workers: each request is answered once, whatever dies."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.bench.simulated import Simulated
from quire.engine.request import EngineRequest, EngineResult
from quire.errors import CheckpointError, QuireError, WorkerDiedError
from quire.fleet.coordinator import (
    FRUITLESS_DEATHS,
    START_DEATHS,
    Answer,
    Coordinator,
)
from quire.fleet.messages import Command, Died, Message, Start
from quire.fleet.share import Costs
from quire.fleet.suspects import ALONE_DEATHS
from tests.fleet.test_cut import groups, random_requests

COSTS = Costs(context=500)


def finish(
    coordinator: Coordinator, transport: Simulated, windows: Sequence[Sequence[EngineRequest]]
) -> dict[int, Answer]:
    """Run all windows to their end, as `Fleet` does."""
    left = list(windows)
    found: dict[int, Answer] = {}
    for _ in range(100_000):
        if left and coordinator.waiting <= 3:
            coordinator.add(left.pop(0))
        for worker, command in coordinator.commands():
            transport.send(worker, command)
        for worker, message in transport.wait(0):
            for id, answer in coordinator.receive(worker, message):
                assert id not in found
                found[id] = answer
        if not left and not coordinator.unfinished:
            return found
    raise AssertionError("no end")


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    speeds=st.lists(st.sampled_from([0.3, 1.0, 1.0, 5.0]), min_size=1, max_size=5),
    moment=st.sampled_from([10.0, 100.0, 3000.0]),
    batch=st.sampled_from([1, 3, 100]),
    poison=st.sets(st.integers(0, 30), max_size=3),
    deaths=st.integers(0, ALONE_DEATHS - 1),
    windows=st.integers(1, 3),
)
def test_every_request_is_answered_once_whatever_dies(
    seed: int,
    speeds: list[float],
    moment: float,
    batch: int,
    poison: set[int],
    deaths: int,
    windows: int,
) -> None:
    rng = random.Random(seed)
    requests = random_requests(seed, most=30)
    lives = [deaths]

    def dies(_: int) -> bool:
        now = lives[0] > 0 and rng.random() < 0.2
        lives[0] -= now
        return now

    transport = Simulated(
        speeds,
        COSTS,
        moment=moment,
        batch=batch,
        outputs=lambda r: 1 + r.id % COSTS.limit(r),
        poison=frozenset(poison),
        dies=dies,
    )
    coordinator = Coordinator(len(speeds), COSTS)
    found = finish(coordinator, transport, [requests[i::windows] for i in range(windows)])
    assert set(found) == {r.id for r in requests}
    for request in requests:
        answer = found[request.id]
        if request.id in poison:
            assert isinstance(answer, WorkerDiedError)
        else:
            assert isinstance(answer, EngineResult)
    assert all(member.empty for member in coordinator.members)


def test_the_slow_are_relieved() -> None:
    """A worker of a tenth of the speed ends with the others, but for what it has started."""
    requests = groups([1] * 400, prefix=10)
    transport = Simulated([1.0, 1.0, 0.1], COSTS, moment=200, batch=4)
    finish(Coordinator(3, COSTS), transport, [requests])
    work = Costs().span(0, 40) * 400
    assert transport.now < 1.1 * work / 2.1 + 4 * 40 / 0.1


def test_long_outputs_in_one_part_are_shared_out() -> None:
    requests = groups([50] * 8, prefix=200)
    transport = Simulated(
        [1.0] * 4, COSTS, moment=200, batch=4, outputs=lambda r: 10 if r.id < 300 else 1
    )
    coordinator = Coordinator(4, COSTS)
    finish(coordinator, transport, [requests])
    work = [worker.at for worker in transport.workers]
    assert max(work) < 1.15 * sum(work) / 4
    assert coordinator.stats.computed_tokens <= 1.1 * (8 * 200 + 400 * 20)


def test_nothing_moves_where_all_is_well() -> None:
    requests = groups([25] * 8, prefix=400)
    transport = Simulated([1.0] * 4, COSTS, batch=4)
    coordinator = Coordinator(4, COSTS)
    finish(coordinator, transport, [requests])
    assert coordinator.stats.computed_tokens == 8 * 400 + 200 * 20


def test_poison_costs_few_deaths() -> None:
    dead: list[str] = []
    coordinator = Coordinator(3, COSTS)
    coordinator.warn = dead.append
    requests = groups([100] * 5, prefix=50)
    transport = Simulated([1.0] * 3, COSTS, poison=frozenset([123]))
    found = finish(coordinator, transport, [requests])
    assert isinstance(found[123], WorkerDiedError)
    assert "simulated poison" in str(found[123])
    assert sum(isinstance(answer, EngineResult) for answer in found.values()) == 499
    assert len(dead) <= 9


def test_requests_of_an_earlier_call_are_dropped() -> None:
    requests = groups([10] * 4, prefix=50)
    transport = Simulated([1.0] * 2, COSTS, moment=50, batch=2)
    coordinator = Coordinator(2, COSTS)
    coordinator.add(requests[:30])
    for _ in range(6):
        for worker, command in coordinator.commands():
            transport.send(worker, command)
        for worker, message in transport.wait(0):
            coordinator.receive(worker, message)
    coordinator.clear()
    assert coordinator.unfinished == coordinator.waiting == 0
    again = [EngineRequest(r.id, r.prompt, r.params, r.seed) for r in requests]
    found = finish(coordinator, transport, [again[20:]])
    assert set(found) == {r.id for r in again[20:]}


class Failing(Simulated):
    """Workers that do not start."""

    def __init__(self, workers: int, death: Callable[[int], Died | None]) -> None:
        super().__init__([1.0] * workers, COSTS)
        self._death = death
        self.starts = 0

    def send(self, worker: int, command: Command) -> None:
        super().send(worker, command)
        if isinstance(command, Start):
            self.starts += 1

    def wait(self, seconds: float) -> list[tuple[int, Message]]:
        messages = super().wait(seconds)
        return [(n, self._death(n) or message) for n, message in messages]


def test_an_error_at_every_start_is_raised_as_it_is() -> None:
    transport = Failing(3, lambda n: Died("no model", CheckpointError(f"No model on {n}.")))
    with pytest.raises(CheckpointError, match="No model on"):
        finish(Coordinator(3, COSTS), transport, [groups([5], prefix=50)])
    assert transport.starts == 3


def test_deaths_at_every_start_are_raised_with_their_cause() -> None:
    transport = Failing(2, lambda _: Died("killed by SIGKILL"))
    with pytest.raises(QuireError, match="killed by SIGKILL"):
        finish(Coordinator(2, COSTS), transport, [groups([5], prefix=50)])
    assert transport.starts == 2 * START_DEATHS


def test_the_others_do_the_work_of_one_that_cannot_start() -> None:
    transport = Failing(3, lambda n: Died("no", CheckpointError("No.")) if n == 1 else None)
    requests = groups([5] * 6, prefix=50)
    assert len(finish(Coordinator(3, COSTS), transport, [requests])) == 30
    assert transport.starts == 3


def test_workers_that_die_of_everything_end_the_job() -> None:
    requests = groups([50] * 4, prefix=50)
    transport = Simulated([1.0] * 2, COSTS, dies=lambda _: True)
    with pytest.raises(QuireError, match="simulated"):
        finish(Coordinator(2, COSTS), transport, [requests])
    few = Simulated([1.0] * 2, COSTS, poison=frozenset(range(4)))
    found = finish(Coordinator(2, COSTS), few, [groups([4], prefix=10)])
    assert all(isinstance(answer, WorkerDiedError) for answer in found.values())
    assert FRUITLESS_DEATHS > 4 * ALONE_DEATHS
