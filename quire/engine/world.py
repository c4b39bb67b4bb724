"""The world that plans are applied to: tree, pages and sequences. No tensors.

It validates nothing that the pool and the tree do not already refuse, and it counts what happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.attention.segments import Item
from quire.kv.pages import PagePool, Segment
from quire.kv.tree import Node, PrefixTree, Tokens
from quire.schedule.state import Policy, Sequence, State, StepPlan
from quire.schedule.step import plan_step

_SEQUENCE_KEY = 1 << 60  # sorts a sequence's own rows after the nodes below its leaf


@dataclass(frozen=True)
class Work:
    """Tokens to compute in a step: where they stand, their ids int32 and slots int64 [count]."""

    item: Item
    tokens: Tokens
    slots: NDArray[np.int64]
    node: Node | None  # the node they belong to,
    sequence: Sequence  # or else the sequence's output; for a node, on whose behalf


@dataclass
class Counters:
    """What happened so far. Tokens unless said otherwise."""

    prompt_asked: int = 0  # prompt tokens of sequences with an output, as if nothing were shared
    prompt_computed: int = 0  # prompt tokens computed, recomputation included
    prompt_loaded: int = 0  # prompt tokens whose KV was read from files instead
    output_computed: int = 0  # output tokens computed, recomputation included
    recomputed: int = 0  # tokens computed again after preemption or eviction
    output: int = 0
    preemptions: int = 0  # events
    finished_ratio: float = 0.0
    finished: int = 0  # sequences


class World:
    """Tree, pool and queues of one engine."""

    def __init__(self, pages: int, page_tokens: int, chunk: int, policy: Policy) -> None:
        self.policy = policy
        self.pool = PagePool(pages, page_tokens)
        self.tree = PrefixTree(self.pool)
        self.state = State(self.tree, chunk)
        self.counters = Counters()
        self.steps = 0
        self.views: set[int] = set()  # ids of nodes that hold one sequence's selection
        self._next_sequence = 0

    def add(self, prompts: Iterable[tuple[int, Tokens, int, int, bool]]) -> list[Sequence]:
        """Add requests ``(id, prompt, samples, max_new, shared)`` as one planning window."""
        added = []
        for request, prompt, samples, max_new, shared in prompts:
            leaf = self.tree.insert(prompt, shared=shared)
            for sample in range(samples):
                self.tree.retain(leaf)
                added.append(Sequence(self._next_sequence, request, sample, prompt, leaf, max_new))
                self._next_sequence += 1
        waiting = self.policy.arrange(self.tree, [*self.state.waiting, *added])
        self.state.waiting.clear()
        self.state.waiting.extend(waiting)
        return added

    def plan(self) -> StepPlan:
        """The policy's next step."""
        return plan_step(self.state, self.policy)

    def apply(self, plan: StepPlan) -> list[Work]:
        """Carry out ``plan``; returns its work in depth-first order of the tree."""
        self.steps += 1
        for seq in plan.preempt:
            self._preempt(seq)
        for node in plan.evict:
            if node.segment is None:  # a view that went with its preempted sequence
                continue
            if node.readers:
                self.counters.recomputed += node.computed
            self._evict(node)
        for seq in plan.unshare:
            self._unshare(seq)
        for seq in plan.admit:
            admitted = self.state.waiting.popleft()
            assert admitted is seq
            self.tree.activate(seq.leaf, self.steps)
            self.state.running.append(seq)
        works = [self._prefill(node, count, seq) for node, count, seq in plan.prefill]
        works += [self._extend(seq, count) for seq, count in plan.extend]
        return sorted(works, key=lambda work: work.item.key)

    def finish(self, seq: Sequence) -> None:
        """Give back what ``seq`` holds; frees the KV that nobody will read again."""
        counters = self.counters
        counters.finished += 1
        counters.finished_ratio += len(seq.output) / seq.max_new
        if counters.finished >= 32:
            self.state.output_ratio = counters.finished_ratio / counters.finished
        self._leave(seq)

    def abort(self, dropped: Iterable[Sequence]) -> None:
        """Drop unfinished sequences and give back what they hold."""
        ids = {seq.id for seq in dropped}
        for seq in [seq for seq in self.state.running if seq.id in ids]:
            self._leave(seq)
        waiting = list(self.state.waiting)
        self.state.waiting.clear()
        self.state.waiting.extend(seq for seq in waiting if seq.id not in ids)
        for seq in waiting:
            if seq.id in ids:
                self._let_go(seq)

    def view(self, seq: Sequence, entries: int) -> Segment | None:
        """Move a running ``seq`` to a node of its own, with slots for ``entries`` of its prompt.

        The node stands for the whole prompt. What nobody else reads of the old path is freed
        first. Returns None where there is no room: the sequence then waits, to be computed alone.
        """
        hidden = seq.leaf.hidden
        self.tree.activate(seq.leaf, self.steps, by=-1)
        self._let_go(seq)
        self._move(seq)
        need = self.pool.pages_for(None, entries)
        for node in sorted(self.tree.resident.values(), key=lambda n: (n.last_use, -n.end)):
            if need <= self.pool.free_pages:
                break
            if not node.active and not node.holders:
                self.counters.recomputed += node.computed if node.readers else 0
                self._evict(node)
        if need > self.pool.free_pages:
            self._wait(seq)
            return None
        self.tree.append(seq.leaf, entries)
        assert seq.leaf.segment is not None
        seq.leaf.segment.length = len(seq.prompt)
        seq.leaf.hidden = hidden
        self.tree.activate(seq.leaf, self.steps)
        self.views.add(seq.leaf.id)
        return seq.leaf.segment

    def refill(self, seq: Sequence, entries: int) -> None:
        """Give a sequence's view slots for ``entries`` that stand for its prompt and its tail."""
        segment, tail = seq.leaf.segment, seq.tail
        assert segment is not None
        prompt, output = segment.length, tail.length
        self.pool.release(segment)
        self.pool.release(tail)
        self.pool.append(segment, entries)
        segment.length, tail.length = prompt, output

    def restart(self, seq: Sequence) -> None:
        """Send a running ``seq`` back to wait, to be computed alone from its first token on."""
        self.tree.activate(seq.leaf, self.steps, by=-1)
        self._let_go(seq)
        self._move(seq)
        self._wait(seq)

    def _wait(self, seq: Sequence) -> None:
        """Put a running sequence, of whose prompt nothing is computed, back in the queue."""
        self.counters.preemptions += 1
        self.counters.recomputed += len(seq.prompt) + seq.tail.length
        self.pool.release(seq.tail)
        self.state.running.remove(seq)
        self.state.waiting.appendleft(seq)

    def _evict(self, node: Node) -> None:
        self.tree.evict(node)
        self.views.discard(node.id)
        self.tree.prune(node)

    def _leave(self, seq: Sequence) -> None:
        self.pool.release(seq.tail)
        self.state.running.remove(seq)
        self.tree.activate(seq.leaf, self.steps, by=-1)
        self._let_go(seq)

    def _let_go(self, seq: Sequence) -> None:
        if not seq.output:
            seq.leaf.ends -= 1
        self.tree.release(seq.leaf)
        for node in reversed(seq.leaf.path()):
            drop = not self.policy.cache or node.loose_leaf
            if node.segment is not None and not node.readers and not node.holders and drop:
                self.tree.evict(node)
                self.views.discard(node.id)
        self.tree.prune(seq.leaf)

    def _preempt(self, seq: Sequence) -> None:
        self.counters.preemptions += 1
        self.counters.recomputed += seq.tail.length
        self.pool.release(seq.tail)
        self.tree.activate(seq.leaf, self.steps, by=-1)
        if seq.leaf.id in self.views:  # it may hold output tokens too
            self.counters.recomputed += seq.leaf.computed
            self.tree.evict(seq.leaf)
            self.views.discard(seq.leaf.id)
        self.state.running.remove(seq)
        self.state.waiting.appendleft(seq)

    def _unshare(self, seq: Sequence) -> None:
        """Give ``seq`` its whole prompt in one segment: shares nothing, wastes no page."""
        if not seq.output:
            seq.leaf.ends -= 1
        self.tree.release(seq.leaf)
        old = seq.leaf
        for node in reversed(old.path()):
            if node.segment is not None and not node.active and not node.holders:
                self.counters.recomputed += node.computed
                self.tree.evict(node)
        self.tree.prune(old)
        self._move(seq)

    def _move(self, seq: Sequence) -> None:
        """Give ``seq``, which has let go of its path, a node of its own for the whole prompt."""
        seq.leaf = self.tree.insert(seq.prompt, shared=False)
        self.tree.retain(seq.leaf)
        if seq.output:
            seq.leaf.ends -= 1

    def _prefill(self, node: Node, count: int, seq: Sequence) -> Work:
        tokens = node.owed(count)
        start = node.kv_start + node.computed
        slots = self.tree.append(node, count)
        path = node.path()
        before = tuple((p.segment, p.kv_start) for p in path[:-1] if p.segment is not None)
        assert node.segment is not None
        item = Item(tuple(p.id for p in path), start, count, node.segment, before)
        self.counters.prompt_computed += count
        seq.computed_here += count
        return Work(item, tokens, slots, node, seq)

    def _extend(self, seq: Sequence, count: int) -> Work:
        done = seq.tail.length
        slots = self.pool.append(seq.tail, count)
        self.counters.output_computed += count
        path = seq.leaf.path()
        before = tuple((p.segment, p.kv_start) for p in path if p.segment is not None)
        key = (*(p.id for p in path), _SEQUENCE_KEY + seq.id)
        item = Item(key, seq.leaf.end + done, count, seq.tail, before)
        tokens = np.array(seq.output[done : done + count], dtype=np.int32)
        return Work(item, tokens, slots, None, seq)
