"""The largest groups of a window: which prefixes its sequences share, and what each saves."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import nlargest

import numpy as np

from quire.kv.tree import Node, Tokens

HEAD = 64  # token ids of a span that a group carries, for an excerpt of its text


@dataclass(frozen=True)
class Group:
    """A span ``[start, end)`` of prompt tokens that is computed once for several sequences.

    ``key`` is a hash of the token ids ``[0, end)``: the same prefix has the same key in every
    window and process. ``head``: the first ids of the span. ``readers``: sequences of the window;
    ``older``: unfinished ones of earlier windows. ``saved``: prompt tokens that the window's
    readers need not compute.
    """

    key: bytes
    start: int
    end: int
    head: tuple[int, ...]
    readers: int
    older: int
    saved: int


def largest_groups(leaves: Iterable[Node], count: int) -> list[Group]:
    """The ``count`` groups that save most, largest first.

    ``leaves``: the node at which each new sequence's prompt ends, in a tree whose segments are
    decided and of which nothing has run since. A span is charged to the first window that reads
    it, so over all groups of a window ``saved`` is what the plan saves.
    """
    readers = Counter(leaves)
    nodes = list(readers)
    for node in nodes:  # grows: every ancestor once
        above = node.parent
        if above is not None and above.parent is not None and above not in readers:
            readers[above] = 0
            nodes.append(above)
    nodes.sort(key=lambda n: n.end, reverse=True)  # children before parents
    found: list[tuple[int, int, int, Node]] = []
    for node in nodes:
        above = node.parent
        if above is not None and above in readers:
            readers[above] += readers[node]
        if node.folded:
            continue
        older = node.readers - readers[node]
        saved = readers[node] * (node.end - node.kv_start) - (0 if older else node.missing)
        if saved > 0:
            found.append((saved, -node.end, -node.id, node))
    return [_group(node, readers[node], saved) for saved, _, _, node in nlargest(count, found)]


def _group(node: Node, readers: int, saved: int) -> Group:
    prefix = _prefix(node)
    start = node.kv_start
    return Group(
        key=hashlib.blake2b(prefix.tobytes(), digest_size=16).digest(),
        start=start,
        end=node.end,
        head=tuple(prefix[start : start + HEAD].tolist()),
        readers=readers,
        older=node.readers - readers,
        saved=saved,
    )


def _prefix(node: Node) -> Tokens:
    """The token ids ``[0, end)``, int32 [end]."""
    pieces = []
    at: Node | None = node
    while at is not None:
        pieces.append(at.tokens)
        at = at.parent
    return np.concatenate(pieces[::-1])
