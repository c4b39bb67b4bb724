"""Who holds which requests, and what to do next: when work arrives, runs out, or a worker dies.

It talks to workers in `messages` and knows neither processes nor time. Every window is cut into one
part a worker, each a run of neighbours in the prefix tree (cut.py). A worker with nothing left to
start takes some of what the busiest has not started. A worker that dies is started again and
what it held goes to all, but for what may have killed it (suspects.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from quire.api.outputs import Stats
from quire.engine.request import EngineRequest, EngineResult
from quire.errors import EngineStallError, QuireError, RequestError
from quire.fleet.cut import cut, split
from quire.fleet.messages import Advance, Command, Died, Message, Ready, Report, Start
from quire.fleet.share import Costs, Share, in_order
from quire.fleet.suspects import Suspects

START_DEATHS = 3  # in a row, while starting: the worker is given up
FRUITLESS_DEATHS = 30  # in a row, without an answer to any request: the job is given up
ENOUGH = 32  # finished samples from which the length of outputs is estimated
_NOW = {"running", "waiting", "kv_bytes", "peak_kv_bytes"}  # fields of Stats of living workers

Answer = EngineResult | RequestError


@dataclass(eq=False)
class Member:
    """A worker as the coordinator sees it.

    ``unsent``: requests that it is to get next; ``held``: those that it has, ``waiting`` of them
    not started as of its last report. ``recall``: what it is to give back, for ``taker``.
    """

    state: Literal["absent", "starting", "idle", "busy", "gone"] = "absent"
    unsent: dict[int, EngineRequest] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    waiting: list[int] = field(default_factory=list)
    recall: list[int] = field(default_factory=list)
    taker: Member | None = None
    expects: bool = False  # it is somebody's taker
    trial: bool = False  # it runs suspects and gets nothing else
    fresh: bool = False  # it has requests of an earlier call, to be dropped
    stale: bool = False  # so has its next report
    start_deaths: int = 0
    stats: Stats | None = None

    @property
    def open(self) -> bool:
        """Whether it may get requests."""
        return self.state != "gone" and not self.trial

    @property
    def empty(self) -> bool:
        """Whether it has nothing to do."""
        return not self.unsent and not self.held

    @property
    def queued(self) -> bool:
        """Whether it has something left to start."""
        return bool(self.unsent or self.waiting)

    @property
    def hungry(self) -> bool:
        """Whether it could start more than it has."""
        ready = self.state in ("idle", "busy") and self.open
        return ready and not self.queued and not self.expects

    def drop(self) -> None:
        """Forget all requests."""
        self.unsent.clear()
        self.held.clear()
        self.waiting, self.recall, self.taker = [], [], None
        self.expects = self.trial = False


class Coordinator:
    """Hands requests to ``workers`` workers and takes their answers; each request gets one.

    ``costs`` are those of the model. ``warn`` is told of deaths. ``least_kv``: bytes of KV that a
    worker must have to be let in.
    """

    def __init__(self, workers: int, costs: Costs | None = None) -> None:
        self.members = [Member() for _ in range(workers)]
        self.costs = costs or Costs()
        self.least_kv = 0
        self.warn: Callable[[str], None] = lambda _: None
        self._pending: dict[int, EngineRequest] = {}
        self._cost: dict[int, float] = {}  # of a request after its neighbour
        self._spare: list[EngineRequest] = []  # with no worker yet
        self._suspects = Suspects()
        self._fruitless = 0
        self._lost: QuireError | None = None  # why the last worker was given up
        self._past: list[Stats] = []  # of workers that died
        self._outputs = (0, 0.0)  # finished samples, sum of their parts of the limit

    @property
    def unfinished(self) -> int:
        """Requests without an answer."""
        return len(self._pending)

    @property
    def waiting(self) -> int:
        """Requests that have not started, as far as is known."""
        queued = sum(len(m.unsent) + len(m.waiting) for m in self.members)
        return queued + len(self._spare) + len(self._suspects)

    @property
    def starting(self) -> int:
        """Workers that are not ready and may be."""
        return sum(m.state in ("absent", "starting") for m in self.members)

    @property
    def stats(self) -> Stats:
        """Sums over all workers, those that died included; seconds are a worker's mean."""
        alive = [m.stats for m in self.members if m.stats is not None]
        total = {}
        for each in fields(Stats):
            counted = alive if each.name in _NOW else [*alive, *self._past]
            amount = sum(getattr(stats, each.name) for stats in counted)
            total[each.name] = (
                amount / len(self.members) if each.name.endswith("_seconds") else amount
            )
        return Stats(**total)

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Add a window of requests."""
        self._pending.update({r.id: r for r in requests})
        self._spare.extend(requests)

    def clear(self) -> None:
        """Forget all requests; workers drop what they have of them when they get the next."""
        self._pending.clear()
        self._cost.clear()
        self._spare.clear()
        self._suspects.clear()
        for member in self.members:
            member.fresh = member.fresh or bool(member.held)
            member.stale = member.state == "busy"
            member.drop()

    def commands(self) -> list[tuple[int, Command]]:
        """What workers are to do now. Raises QuireError when there are none left."""
        if all(m.state == "gone" for m in self.members):
            raise self._lost or QuireError("There are no workers.")
        if self._fruitless > FRUITLESS_DEATHS:
            raise self._lost or QuireError("Workers die whatever they run.")
        self._start_trials()
        self._spread()
        self._level()
        found: list[tuple[int, Command]] = []
        for number, member in enumerate(self.members):
            if member.state == "absent":
                member.state = "starting"
                found.append((number, Start()))
            elif member.state == "idle" and not member.empty:
                found.append((number, self._advance(member)))
        if self._pending and all(m.state in ("idle", "gone") for m in self.members):
            raise EngineStallError(f"No worker runs, and {len(self._pending)} requests wait.")
        return found

    def receive(self, worker: int, message: Message) -> list[tuple[int, Answer]]:
        """Take in what ``worker`` says; returns the answers to requests, by id."""
        member = self.members[worker]
        if isinstance(message, Report):
            return self._report(member, message)
        if isinstance(message, Died):
            return self._bury(worker, message)
        return self._admit(worker, message)

    def _admit(self, worker: int, ready: Ready) -> list[tuple[int, Answer]]:
        member = self.members[worker]
        if ready.budget.kv < self.least_kv:
            error = QuireError(
                f"Worker {worker} has {ready.budget.kv:,} bytes of KV, the others "
                f"{self.least_kv:,}."
            )
            return self._bury(worker, Died(str(error), error))
        member.state, member.start_deaths = "idle", 0
        return []

    def _report(self, member: Member, report: Report) -> list[tuple[int, Answer]]:
        member.state, member.stats = "idle", report.stats
        if member.stale:
            member.stale = False
            return []
        answers: list[tuple[int, Answer]] = []
        for result in report.results:
            member.held.discard(result.id)
            self._learn(self._pending[result.id], result)
            answers.append(self._answer(result.id, result))
        member.waiting = report.waiting
        sent, waiting = not member.recall, set(report.waiting)
        member.recall = [id for id in member.recall if id in waiting]
        if member.taker is not None and not member.recall:
            if sent:
                self._move(member, member.taker, report.withdrawn)
            member.taker.expects = False
            member.taker = None
        if member.empty:
            member.trial = False
        return answers

    def _move(self, donor: Member, taker: Member, ids: list[int]) -> None:
        """Hand on what ``donor`` gave back."""
        donor.held.difference_update(ids)
        moved = {id: self._pending[id] for id in ids}
        if taker.open:
            taker.unsent.update(moved)
        else:
            self._spare.extend(moved.values())

    def _answer(self, id: int, answer: Answer) -> tuple[int, Answer]:
        self._fruitless = 0
        del self._pending[id]
        self._cost.pop(id, None)
        self._suspects.forget(id)
        return id, answer

    def _learn(self, request: EngineRequest, result: EngineResult) -> None:
        """Estimate how long outputs are, by those that are finished."""
        count, used = self._outputs
        count += len(result.samples)
        used += sum(len(s.token_ids) for s in result.samples) / self.costs.limit(request)
        self._outputs = count, used
        if count >= ENOUGH:
            self.costs = replace(self.costs, output=used / count)

    def _bury(self, worker: int, death: Died) -> list[tuple[int, Answer]]:
        """Find what to do with a dead worker and with its requests."""
        member = self.members[worker]
        reason = f"Worker {worker} died: {death.cause}."
        self._lost = death.error or QuireError(
            reason, action="Look for its own words above, or in the log of its machine."
        )
        if member.stats is not None:
            self._past.append(member.stats)
        if member.taker is not None:
            member.taker.expects = False
        unsent, held, trial = [*member.unsent.values()], sorted(member.held), member.trial
        started = member.state in ("idle", "busy")
        member.start_deaths += 0 if started else 1
        hopeless = not started and (death.error is not None or member.start_deaths >= START_DEATHS)
        member.drop()
        member.stats, member.fresh, member.stale = None, False, False
        member.state = "gone" if hopeless else "absent"
        self.warn(f"{reason} It is {'given up' if hopeless else 'started again'}.")
        if trial and unsent:
            self._suspects.put(unsent)
        else:
            self._spare.extend(unsent)
        if not started:
            return []
        self._fruitless += 1
        lost = [self._pending[id] for id in held]
        if not trial:
            self._spare.extend(self._suspects.died_among(lost))
            return []
        error = self._suspects.died_of(lost, death.cause)
        return [self._answer(lost[0].id, error)] if error is not None else []

    def _start_trials(self) -> None:
        """Give suspects to workers that have nothing else."""
        for member in self.members:
            if self._suspects and member.open and member.empty:
                member.trial = True
                member.unsent = {r.id: r for r in self._suspects.next()}

    def _spread(self) -> None:
        """Cut what has no worker into parts, so that all workers have like much to do."""
        members = [m for m in self.members if m.open]
        if not self._spare or not members:
            return
        requests = in_order(self._spare)
        self._spare = []
        share = Share.make(requests, self.costs)
        own = share.total[1:] - share.total[:-1]
        self._cost.update(zip((r.id for r in requests), own.tolist(), strict=True))
        loads = [self._begun(m) + self._queued(m) for m in members]
        for member, part in zip(members, cut(share, loads), strict=True):
            member.unsent.update({requests[i].id: requests[i] for i in part})

    def _level(self) -> None:
        """Let workers that have nothing left to start take from the busiest."""
        for taker in self.members:
            if taker.hungry:
                donors = [m for m in self.members if m.open and m.taker is None and m.queued]
                donors.sort(key=lambda m: -self._begun(m) - self._queued(m))
                next((donor for donor in donors if self._take(donor, taker)), None)

    def _take(self, donor: Member, taker: Member) -> bool:
        """Move to ``taker`` what ends sooner there, or recall it; False if there is nothing."""
        queued = [self._pending[id] for id in (*donor.waiting, *donor.unsent)]
        share = Share.make(queued, self.costs)
        moved = queued[split(share, self._begun(donor), self._begun(taker)) :]
        later = [r.id for r in moved if r.id not in donor.unsent]
        for request in moved:
            if donor.unsent.pop(request.id, None) is not None:
                taker.unsent[request.id] = request
        if later:
            donor.recall, donor.taker, taker.expects = later, taker, True
        return bool(moved)

    def _begun(self, member: Member) -> float:
        """The work left of requests that have started: half of it, as far as anyone knows."""
        return self._sum(member.held.difference(member.waiting)) / 2

    def _queued(self, member: Member) -> float:
        """The work of requests that have not started."""
        return self._sum(member.waiting) + self._sum(member.unsent)

    def _sum(self, ids: Iterable[int]) -> float:
        return sum(self._cost.get(id, 0.0) for id in ids)

    def _advance(self, member: Member) -> Advance:
        command = Advance(list(member.unsent.values()), member.recall, member.fresh)
        member.held.update(member.unsent)
        member.waiting = [*member.waiting, *member.unsent]
        member.unsent, member.recall, member.fresh = {}, [], False
        member.state = "busy"
        return command
