"""The batch policy: the whole job is planned at once (BatchLLM, arXiv 2412.03594).

Shared spans are computed once, sequences run in depth-first order with decode-heavy groups first,
and KV is freed with its last reader.
"""

from __future__ import annotations

from quire.kv.tree import PrefixTree
from quire.schedule.planner import decide_segments, depth_first
from quire.schedule.state import Policy, Sequence


def _arrange(tree: PrefixTree, waiting: list[Sequence]) -> list[Sequence]:
    decide_segments(tree.root)
    return depth_first(tree.root, waiting)


def _reserve(seq: Sequence, output_ratio: float) -> int:
    """Output tokens to find room for: what finished sequences used of their limit."""
    return min(seq.max_new, max(len(seq.output) + 1, round(seq.max_new * output_ratio)))


BATCH = Policy("batch", _arrange, _reserve, cache=False)
