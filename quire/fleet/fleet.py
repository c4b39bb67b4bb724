"""The face of `LLM` over several workers."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from types import TracebackType
from typing import Any

from quire.api.llm import LARGEST_GROUPS, LLM
from quire.api.outputs import RequestOutput, Stats, complete
from quire.api.prepare import Preparer, Windows
from quire.api.setup import Prompt, Setup
from quire.decode.grammar import Grammars
from quire.decode.params import SamplingParams
from quire.engine.budget import Budget
from quire.engine.limits import PAGE_TOKENS
from quire.engine.request import EngineRequest, EngineResult
from quire.errors import InvalidRequestError
from quire.fleet.coordinator import Answer, Coordinator
from quire.fleet.messages import Ready, Transport
from quire.fleet.share import Costs
from quire.kv.pages import PagePool
from quire.kv.tree import PrefixTree
from quire.schedule.groups import Group, largest_groups
from quire.schedule.planner import decide_segments

WAIT_SECONDS = 0.25
PATIENCE_SECONDS = 60.0  # for workers to be ready, before it is said that they are waited for


class Fleet:
    """Workers with an `LLM` each that share one job. Use as a context manager, or `close` it.

    `processes.on_this_machine` and `actors.on_ray` make one. Requests are read, tokenized and
    seeded here, so outputs depend neither on the number of workers nor on which runs a request.
    """

    def __init__(
        self,
        transport: Transport,
        workers: int,
        options: dict[str, Any],
        setup: Callable[[Budget], Setup],
        warn: Callable[[str], None],
    ) -> None:
        """Start ``workers`` of ``transport``.

        ``options``: all of `LLM`'s; ``setup`` is called with the smallest worker's memory; ``warn``
        is told of workers that die. Raises what a worker raised if none can start.
        """
        self.model = str(options["model"])
        self.policy = str(options["policy"])
        self.window = int(options["window"])
        self._transport = transport
        self._plan = Coordinator(workers)
        try:
            least = self._start(warn)
            self.setup = setup(least)
        except BaseException:
            self.close()
            raise
        self.tokenizer = self.setup.tokenizer
        self._plan.costs, self._plan.least_kv = Costs.of(self.setup.spec), least.kv
        grammars = Grammars(
            self.tokenizer.to_json, self.setup.spec.vocab_size, self.tokenizer.eos_ids, 1
        )
        self._preparer = Preparer(self.setup, grammars, options["seed"], options["on_overlong"])

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        self._transport.close()

    @property
    def stats(self) -> Stats:
        """Work done so far: sums over the workers; seconds are a worker's mean."""
        return self._plan.stats

    def generate_iter(
        self,
        requests: Iterable[tuple[Prompt, SamplingParams]],
        *,
        on_step: Callable[[Stats], None] | None = None,
        on_groups: Callable[[list[Group]], None] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Yield each request's output as it finishes; ``request_id`` is its place in the input.

        ``requests`` is read window by window, one ahead. ``on_step`` is called when workers report,
        some four times a second, ``on_groups`` with the prefixes that save most in each window.
        """
        plan = self._plan
        known: dict[int, RequestOutput] = {}
        answers: list[tuple[int, Answer]] = []
        try:
            with Windows(self._preparer, requests, self.window) as windows:
                while windows.more or plan.unfinished or answers:
                    bad = self._read(windows, known, on_groups)
                    self._command()  # no worker waits while somebody takes the outputs
                    yield from bad
                    for id, answer in answers:
                        yield _answered(known.pop(id), answer)
                    answers = self._hear() if plan.unfinished else []
                    if on_step is not None:
                        on_step(self.stats)
        finally:
            plan.clear()

    def _read(
        self,
        windows: Windows,
        known: dict[int, RequestOutput],
        on_groups: Callable[[list[Group]], None] | None,
    ) -> list[RequestOutput]:
        """Take in the next window if work runs short; returns the requests that cannot run."""
        plan = self._plan
        short = windows.more and plan.waiting <= self.window // 2
        if not short or (plan.unfinished and not windows.ready):
            return []
        window = windows.take()
        good = [request for _, request in window if request is not None]
        plan.add(good)
        if on_groups is not None:
            on_groups(_groups(good))
        known.update({request.id: output for output, request in window if request is not None})
        return [output for output, request in window if request is None]

    def _command(self) -> None:
        """Tell the workers what is to be done."""
        for worker, command in self._plan.commands():
            self._transport.send(worker, command)

    def _hear(self) -> list[tuple[int, Answer]]:
        """Take in what they have done."""
        answers: list[tuple[int, Answer]] = []
        for worker, message in self._transport.wait(WAIT_SECONDS):
            answers += self._plan.receive(worker, message)
        return answers

    def _start(self, warn: Callable[[str], None]) -> Budget:
        """Wait until every worker is ready or given up; returns the smallest memory.

        What is wrong with single workers is told when some could start, and raised when none could.
        """
        plan, troubles, ready = self._plan, list[str](), list[Budget]()
        plan.warn = troubles.append
        since = time.monotonic()
        while plan.starting:
            self._command()
            for worker, message in self._transport.wait(WAIT_SECONDS):
                plan.receive(worker, message)
                if isinstance(message, Ready):
                    ready.append(message.budget)
            if time.monotonic() - since > PATIENCE_SECONDS:
                since = float("inf")
                warn(f"Waiting for {plan.starting} of {len(plan.members)} workers to be ready.")
        plan.commands()  # raises if all are given up
        plan.warn = warn
        for text in troubles:
            warn(text)
        return min(ready, key=lambda budget: budget.kv)


def llm_options(**options: Any) -> dict[str, Any]:
    """All options of `LLM`, with its defaults. Raises TypeError for what is none."""
    bound = inspect.signature(LLM).bind(**options)
    bound.apply_defaults()
    return dict(bound.arguments)


def make_setup(options: dict[str, Any], **more: Any) -> Setup:
    """What `LLM` would know of its model; ``more``: what is not as in ``options``."""
    names = ("model", "dtype", "weights", "memory", "kv_memory", "chunk", "context", "device")
    return Setup.make(**{name: options[name] for name in names} | more)


def count_workers(workers: int | str, auto: int) -> int:
    """The number that ``workers`` says, or ``auto``. Raises InvalidRequestError."""
    if workers == "auto":
        return max(1, auto)
    if not str(workers).isdecimal() or int(workers) < 1:
        raise InvalidRequestError(
            f"workers is {workers!r}.",
            field="workers",
            value=workers,
            action="Give a number from 1, or auto.",
        )
    return int(workers)


def _answered(output: RequestOutput, answer: Answer) -> RequestOutput:
    if isinstance(answer, EngineResult):
        return complete(output, answer)
    output.error = answer
    return output


def _groups(requests: Sequence[EngineRequest]) -> list[Group]:
    """What a window shares, as if one worker ran all of it."""
    tree = PrefixTree(PagePool(0, PAGE_TOKENS))
    leaves = []
    for request in requests:
        leaf = tree.insert(request.prompt, shared=request.params.prompt_logprobs is None)
        for _ in range(request.params.n):
            tree.retain(leaf)
            leaves.append(leaf)
    decide_segments(tree.root)
    return largest_groups(leaves, LARGEST_GROUPS)
