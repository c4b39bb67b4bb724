"""First come, first served, with a least-recently-used prefix cache: what a streaming engine does.

It does not look ahead: sequences run in order of arrival and reuse whatever prefix KV happens to
be there still (vLLM, SGLang with their defaults). The baseline that `batch` is compared with.
"""

from __future__ import annotations

from quire.kv.tree import PrefixTree
from quire.schedule.planner import keep_all
from quire.schedule.state import Policy, Sequence


def _arrange(tree: PrefixTree, waiting: list[Sequence]) -> list[Sequence]:
    keep_all(tree.root)
    return waiting


def _reserve(seq: Sequence, _output_ratio: float) -> int:
    """Only the tokens that it already has: a streaming engine admits by prompt size."""
    return len(seq.output)


FCFS = Policy("fcfs", _arrange, _reserve, cache=True)
