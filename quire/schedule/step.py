"""One step of any policy: decodes first, then unfinished prefills, then new sequences.

The plan is made against a ledger of free pages, so that it can be carried out as it is. Decodes
never wait for a prefill (Sarathi-Serve, arXiv 2403.02310); the number of running sequences is
bounded by memory and by the chunk, not by a request count (BatchLLM, arXiv 2412.03594).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import islice

from quire.kv.pages import Segment
from quire.kv.tree import Node
from quire.schedule.state import Policy, Sequence, State, StepPlan


class Ledger:
    """Free pages as they will be once the plan so far is carried out."""

    def __init__(self, state: State, plan: StepPlan) -> None:
        self.state = state
        self.plan = plan
        self.free = state.pool.free_pages
        self.taken = 0
        self.stopped: dict[int, int] = {}  # node id -> running readers that the plan takes away
        self.used: set[int] = set()  # nodes that the plan's admissions read or write
        self.dropped: set[int] = set()  # nodes that the plan evicts
        self.released: Counter[int] = Counter()  # page -> references that the plan gives back

    def idle(self, protected: Collection[int] = ()) -> list[Node]:
        """Nodes whose KV nobody running reads, in the order in which they may be dropped.

        What the plan's admissions read, though not running yet, is not among them.

        A node's last use is no earlier than that of any node below it, so the order frees
        children before their parents.
        """
        nodes = [
            n
            for n in self.state.tree.resident.values()
            if n.active == self.stopped.get(n.id, 0)
            and n.id not in protected
            and n.id not in self.used
            and n.id not in self.dropped
        ]
        return sorted(nodes, key=lambda n: (n.last_use, -n.end))

    def spare(self, protected: Collection[int]) -> int:
        """Pages that dropping all idle nodes would free."""
        released = self.released.copy()
        return sum(self._freed(node.segment, released) for node in self.idle(protected))

    def _freed(self, segment: Segment | None, released: Counter[int]) -> int:
        """Count the segment's references as given back; pages that become free by it."""
        assert segment is not None
        pages = self.state.pool.pages_of(segment)
        released.update(pages)
        return sum(self.state.pool.references[page] == released[page] for page in pages)

    def take(self, pages: int, protected: Collection[int] = ()) -> bool:
        """Set ``pages`` aside, dropping idle nodes as needed; False, changing nothing, if not."""
        if pages > self.free:
            victims: list[Node] = []
            room = self.free
            released = self.released.copy()
            for node in self.idle(protected):
                if room >= pages:
                    break
                victims.append(node)
                room += self._freed(node.segment, released)
            if room < pages:
                return False
            self.plan.evict.extend(victims)
            self.dropped.update(node.id for node in victims)
            self.released = released
            self.free = room
        self.free -= pages
        self.taken += pages
        return True

    def stop(self, seq: Sequence) -> None:
        """Count ``seq`` as preempted."""
        self.plan.preempt.append(seq)
        self.free += self._freed(seq.tail, self.released)
        for node in seq.leaf.path():
            self.stopped[node.id] = self.stopped.get(node.id, 0) + 1


def plan_step(state: State, policy: Policy) -> StepPlan:
    """Decide the next step. Reads ``state``; changes nothing."""
    plan = StepPlan()
    ledger = Ledger(state, plan)
    running = list(state.running)
    budget = state.chunk - _plan_decodes(state, plan, ledger, running)
    progress: dict[int, int] = {}  # node id -> tokens still missing after this step
    for seq in running:
        budget -= _plan_prefill(seq, plan, ledger, progress, budget)
    if not plan.preempt:
        _plan_admissions(state, policy, plan, ledger, running, progress, budget)
    if running and not plan.tokens and not plan.preempt and all(_stuck(s) for s in running):
        # Half-computed prompts hold all pages: the latest gives up its own.
        victim = running[-1]
        if victim in plan.admit:
            plan.admit.remove(victim)
        else:
            ledger.stop(victim)
        if len(running) == 1:
            plan.unshare.append(victim)
    return plan


def _stuck(seq: Sequence) -> bool:
    """Whether the sequence needs tokens computed before it can sample again."""
    return bool(seq.leaf.missing or seq.owed)


def _plan_decodes(state: State, plan: StepPlan, ledger: Ledger, running: list[Sequence]) -> int:
    """Let every sequence's output catch up; preempts the latest admitted when pages run out.

    Removes the preempted from ``running``. Returns the tokens planned.
    """
    planned = 0
    index = 0
    while index < len(running):
        seq = running[index]
        count = min(seq.owed, state.chunk - planned)
        if state.stride is not None:
            count = min(count, state.stride - seq.tail.length % state.stride)
        index += 1
        if count <= 0:
            continue
        while not ledger.take(state.pool.pages_for(seq.tail, count)):
            victim = running.pop()
            ledger.stop(victim)
            if victim is seq:
                if not running:
                    plan.unshare.append(seq)
                break
        else:
            plan.extend.append((seq, count))
            planned += count
    return planned


def _plan_prefill(
    seq: Sequence, plan: StepPlan, ledger: Ledger, progress: dict[int, int], budget: int
) -> int:
    """Compute the next missing tokens on the path to ``seq``, at most ``budget``.

    ``progress``: node id -> tokens that will still be missing after the plan so far. A node may
    follow its parent in the same step: KV is stored before attention reads it. Returns the
    tokens planned.
    """
    if not seq.leaf.missing:
        return 0
    planned = 0
    path = seq.leaf.path()
    ids = {node.id for node in path}
    for node in path:
        if node.id not in progress and node.missing:
            count = min(node.missing, budget - planned)
            pages = ledger.state.pool.pages_for(node.segment, count)
            if count == 0 or not ledger.take(pages, ids):
                break
            plan.prefill.append((node, count, seq))
            planned += count
            progress[node.id] = node.missing - count
        if progress.get(node.id):
            break
    return planned


def _plan_admissions(
    state: State,
    policy: Policy,
    plan: StepPlan,
    ledger: Ledger,
    running: list[Sequence],
    progress: dict[int, int],
    budget: int,
) -> None:
    """Admit waiting sequences, in order, while tokens and pages are left."""
    if not state.waiting or budget <= 0:
        return
    pool = state.pool
    promised_nodes: set[int] = set()

    def promise(seq: Sequence) -> int:
        """Pages that ``seq`` is still to take: its missing prompt and its expected output."""
        pages = 0
        if seq.leaf.missing:
            for node in seq.leaf.path():
                left = progress.get(node.id, node.missing)
                if left and node.id not in promised_nodes:
                    promised_nodes.add(node.id)
                    pages += pool.pages_for(None if node.id in progress else node.segment, left)
        output = policy.reserve(seq, state.output_ratio) - seq.tail.length
        return pages + (pool.pages_for(seq.tail, output) if output > 0 else 0)

    promised = sum(promise(seq) for seq in running)
    for seq in islice(state.waiting, state.chunk):
        if budget <= 0 or len(running) >= state.chunk:
            break
        path = {node.id for node in seq.leaf.path()}
        if not ledger.dropped.isdisjoint(path):
            break  # this plan takes KV from it: look again in the next step
        promised += promise(seq)
        if promised > ledger.free and running:  # an empty engine always takes the first
            spare = ledger.spare(path) if policy.cache else 0
            if promised > ledger.free + spare:
                break
        taken = ledger.taken
        budget -= _plan_prefill(seq, plan, ledger, progress, budget)
        promised -= ledger.taken - taken
        plan.admit.append(seq)
        running.append(seq)
        ledger.used |= path
