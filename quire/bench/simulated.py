"""Workers that compute nothing and take time by a clock of their own: for judging a plan.

A worker runs up to ``batch`` requests at once, each with an equal part of its speed. A request's
work is that of `Costs`, without the prefix that it has in common with what the worker runs or ran
just before.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.api.outputs import Stats
from quire.engine.budget import Budget
from quire.engine.request import EngineRequest, EngineResult, SampleResult
from quire.fleet.messages import Advance, Command, Died, Message, Ready, Report, Start
from quire.fleet.share import Costs, shares
from quire.kv.tree import Tokens, common_prefix

BUDGET = Budget(0, 0, 0, 0, 0, 1 << 30, 1)


@dataclass
class Worker:
    """One simulated worker. ``speed``: work a second; ``at``: its clock, in seconds."""

    speed: float = 1.0
    at: float = 0.0
    waiting: dict[int, EngineRequest] = field(default_factory=dict)
    running: dict[int, EngineRequest] = field(default_factory=dict)
    left: dict[int, float] = field(default_factory=dict)  # work of running requests
    before: Tokens | None = None  # the last prompt computed
    computed: int = 0  # prompt tokens
    output: int = 0

    def forget(self) -> None:
        """Drop all requests."""
        self.waiting.clear()
        self.running.clear()
        self.left.clear()
        self.before = None

    def stats(self) -> Stats:
        """What can be told of a simulation."""
        return Stats(
            steps=0,
            running=len(self.running),
            waiting=len(self.waiting),
            prompt_tokens=0,
            computed_tokens=self.computed,
            recomputed_tokens=0,
            output_tokens=self.output,
            preemptions=0,
            plan_seconds=0.0,
            model_seconds=0.0,
            sample_seconds=0.0,
            kv_bytes=0,
            peak_kv_bytes=0,
        )


class Simulated:
    """A transport to simulated workers, with the work of ``costs``.

    ``outputs``: tokens that a request produces, its limit if not given. ``moment``: seconds between
    reports. ``poison``: requests that kill the worker that starts them; ``dies`` is asked at every
    report whether the worker dies instead.
    """

    def __init__(
        self,
        speeds: list[float],
        costs: Costs,
        *,
        moment: float = 100.0,
        batch: int = 8,
        outputs: Callable[[EngineRequest], int] | None = None,
        poison: frozenset[int] = frozenset(),
        dies: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self.costs = costs
        self.workers = [Worker(speed) for speed in speeds]
        self.now = 0.0
        self._moment = moment
        self._batch = batch
        self._outputs = outputs or costs.limit
        self._poison = poison
        self._dies = dies
        self._messages: list[tuple[float, int, Message]] = []  # a heap, by time
        self._busy: set[int] = set()

    def send(self, worker: int, command: Command) -> None:
        """Carry ``command`` out; the message comes when its time has come."""
        assert worker not in self._busy, "one command at a time"
        self._busy.add(worker)
        state = self.workers[worker]
        state.at = max(state.at, self.now)
        if isinstance(command, Start):
            state.forget()
            message: Message = Ready(BUDGET)
        else:
            message = self._advance(worker, command)
        heapq.heappush(self._messages, (state.at, worker, message))

    def wait(self, seconds: float) -> list[tuple[int, Message]]:
        """The message that comes first by the workers' clocks."""
        del seconds
        if not self._messages:
            return []
        self.now, worker, message = heapq.heappop(self._messages)
        self._busy.discard(worker)
        return [(worker, message)]

    def close(self) -> None:
        """There is nothing to end."""

    def _advance(self, number: int, command: Advance) -> Message:
        worker = self.workers[number]
        if self._dies(number):
            return Died("simulated")
        if command.fresh:
            worker.forget()
        withdrawn = [id for id in command.withdraw if worker.waiting.pop(id, None) is not None]
        worker.waiting.update({r.id: r for r in command.requests})
        finished = self._run(worker)
        if finished is None:
            return Died("simulated poison")
        return Report(finished, list(worker.waiting), withdrawn, worker.stats())

    def _run(self, worker: Worker) -> list[EngineResult] | None:
        """Let a moment pass, or less if there is nothing left to do; None if it was the last."""
        finished: list[EngineResult] = []
        work = self._moment * worker.speed
        while work > 1e-9 and (worker.waiting or worker.running):
            while worker.waiting and len(worker.running) < self._batch:
                request = worker.waiting.pop(next(iter(worker.waiting)))
                if request.id in self._poison:
                    return None
                self._begin(worker, request)
            step = min(work / len(worker.left), *worker.left.values())
            work -= step * len(worker.left)
            worker.at += step * len(worker.left) / worker.speed
            for id in list(worker.left):
                worker.left[id] -= step
                if worker.left[id] <= 1e-9:
                    del worker.left[id]
                    finished.append(self._result(worker.running.pop(id)))
        if not worker.waiting and not worker.running:
            worker.before = None  # nobody is left to read its KV
        return finished

    def _begin(self, worker: Worker, request: EngineRequest) -> None:
        near = [r.prompt for r in worker.running.values() if shares(r)]
        near += [worker.before] if worker.before is not None else []
        common = 0
        if shares(request):
            common = max((common_prefix(prompt, request.prompt) for prompt in near), default=0)
            worker.before = request.prompt
        size, tokens = len(request.prompt), self._outputs(request)
        worker.running[request.id] = request
        worker.left[request.id] = self.costs.span(common, size) + request.params.n * (
            self.costs.span(size, size + tokens)
        )
        worker.computed += size - common
        worker.output += request.params.n * tokens

    def _result(self, request: EngineRequest) -> EngineResult:
        tokens = [0] * self._outputs(request)
        samples = [SampleResult(i, tokens, "", "length") for i in range(request.params.n)]
        return EngineResult(request.id, len(request.prompt), 0, samples)
