"""What a policy sees and what it may decide. No tensors, no I/O, no clock.

One idea: every sequence has tokens that are wanted and tokens whose KV is computed; a step lets
computed catch up with wanted. Prefill, chunked prefill, decode, prefix hits and recomputation
after preemption are cases of that, not phases (after vLLM v1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.kv.pages import PagePool, Segment
from quire.kv.tree import Node, PrefixTree, Tokens


@dataclass(eq=False)
class Sequence:
    """One sample of one request.

    The prompt's KV lies on the path to ``leaf``; ``tail`` holds that of ``output``. The last
    sampled token has no KV yet, so a caught-up sequence has ``len(output) - tail.length == 1``.
    """

    id: int
    request: int
    sample: int
    prompt: Tokens
    leaf: Node
    max_new: int
    output: list[int] = field(default_factory=list)
    tail: Segment = field(default_factory=Segment)
    computed_here: int = 0  # prompt tokens computed on this sequence's behalf

    @property
    def owed(self) -> int:
        """Output tokens whose KV can be computed now."""
        return 0 if self.leaf.missing else len(self.output) - self.tail.length


@dataclass
class State:
    """The world as a policy reads it.

    ``chunk``: most tokens in a step. ``stride``: steps end at multiples of so many output tokens
    of a sequence, where a KV method looks at it; None: anywhere.
    """

    tree: PrefixTree
    chunk: int
    stride: int | None = None
    waiting: deque[Sequence] = field(default_factory=deque)  # next to be admitted first
    running: list[Sequence] = field(default_factory=list)  # in order of admission
    output_ratio: float = 1.0  # mean of output tokens / max_new over finished sequences

    @property
    def pool(self) -> PagePool:
        """The pages behind the tree."""
        return self.tree.pool


@dataclass
class StepPlan:
    """What happens in one step, to be applied in the order of the fields."""

    preempt: list[Sequence] = field(default_factory=list)
    unshare: list[Sequence] = field(default_factory=list)  # of the preempted: recompute alone
    evict: list[Node] = field(default_factory=list)
    admit: list[Sequence] = field(default_factory=list)  # a prefix of ``waiting``
    prefill: list[tuple[Node, int, Sequence]] = field(default_factory=list)  # on whose behalf
    extend: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        """Whether carrying it out changes anything."""
        return bool(
            self.preempt or self.unshare or self.evict or self.admit or self.prefill or self.extend
        )

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(n for _, n, _ in self.prefill) + sum(n for _, n in self.extend)


@dataclass(frozen=True)
class Policy:
    """How to choose. Everything else is the same for all policies.

    ``arrange`` decides the segments of new tree nodes and returns the waiting sequences in order
    of admission. ``reserve`` gives the output tokens for which an admitted sequence should find
    room. ``cache``: KV that nobody waits for stays until the room is needed (least recently used
    first); otherwise it is freed at once.
    """

    name: str
    arrange: Callable[[PrefixTree, list[Sequence]], list[Sequence]]
    reserve: Callable[[Sequence, float], int]
    cache: bool
