"""The prefix tree: all pending prompts as one radix tree of token ids; each node owns its KV.

A node stands for the tokens ``[start, end)`` of every prompt that passes through it. Its
*segment* holds their keys and values. A **folded** node has no segment: its span was too short to
pay for one, and each of its children computes the span again as part of its own. So the segment
of a kept node covers ``[kv_start, end)``, where ``kv_start`` is the end of the nearest kept
ancestor.

Radix trees for KV reuse: SGLang (arXiv 2312.07104); planning over all pending prompts: BatchLLM
(arXiv 2412.03594).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from quire.kv.pages import PagePool, Segment

Tokens = NDArray[np.int32]


class Node:
    """A span of tokens shared by all prompts below it.

    ``readers``: unfinished sequences at or below; ``active``: those of them that run now;
    ``holders``: nodes strictly below that have a segment;
    ``ends``: sequences whose prompt ends here and that have not sampled their first token.
    ``hidden``: the model's final hidden state of the last token, kept while ``ends`` asks for it
    (opaque here). ``folded`` is None until a planner decides.
    """

    __slots__ = (
        "active",
        "children",
        "ends",
        "folded",
        "hidden",
        "holders",
        "id",
        "last_use",
        "loose",
        "parent",
        "readers",
        "segment",
        "start",
        "tokens",
    )

    def __init__(self, id: int, parent: Node | None, start: int, tokens: Tokens) -> None:
        self.id = id
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.children: dict[int, Node] = {}  # by first token
        self.loose: dict[int, Node] = {}  # children that share with nobody, by id
        self.segment: Segment | None = None
        self.folded: bool | None = None
        self.readers = 0
        self.active = 0
        self.holders = 0
        self.ends = 0
        self.hidden: object | None = None
        self.last_use = 0

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    @property
    def kv_start(self) -> int:
        """First position that the node's own segment covers."""
        above = self.kept_parent()
        return above.end if above is not None else 0

    @property
    def computed(self) -> int:
        """Tokens of ``[kv_start, end)`` whose KV is in the segment."""
        return self.segment.length if self.segment is not None else 0

    @property
    def missing(self) -> int:
        """Tokens of ``[kv_start, end)`` that are still to be computed."""
        return self.end - self.kv_start - self.computed

    @property
    def loose_leaf(self) -> bool:
        """Whether no later prompt can ever share this node."""
        return self.parent is not None and self.id in self.parent.loose

    @property
    def branches(self) -> list[Node]:
        """All children."""
        return [*self.children.values(), *self.loose.values()]

    def kept_parent(self) -> Node | None:
        """The nearest ancestor that has a segment of its own, None at the top."""
        node = self.parent
        while node is not None and node.folded:
            node = node.parent
        return node if node is not None and node.parent is not None else None

    def path(self) -> list[Node]:
        """The kept nodes from the top down to this one, itself included."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            if not node.folded or node is self:
                nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def owed(self, count: int) -> Tokens:
        """The next ``count`` token ids to compute, from position ``kv_start + computed``."""
        start = self.kv_start + self.computed
        pieces: list[Tokens] = []
        node: Node = self
        while True:
            pieces.append(node.tokens[max(0, start - node.start) :])
            if node.start <= start or node.parent is None:
                break
            node = node.parent
        pieces.reverse()
        span = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        return span[:count]


class PrefixTree:
    """Radix tree over token ids. The root holds no tokens."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._next_id = 0
        self.root = self._node(None, 0, np.empty(0, dtype=np.int32))
        self.resident: dict[int, Node] = {}  # nodes with a segment, by id

    def _node(self, parent: Node | None, start: int, tokens: Tokens) -> Node:
        node = Node(self._next_id, parent, start, tokens)
        self._next_id += 1
        return node

    def match(self, tokens: Tokens) -> tuple[Node, int]:
        """The deepest node that shares a prefix with ``tokens``, and the length shared."""
        node, at = self.root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                break
            same = common_prefix(child.tokens, tokens[at:])
            node, at = child, at + same
            if same < len(child.tokens):
                break
        return node, at

    def insert(self, tokens: Tokens, *, shared: bool = True) -> Node:
        """The node at which the prompt ``tokens`` (int32, at least one) ends.

        Nodes are made and split as needed. With ``shared=False`` the prompt gets a node of its
        own below the root that no other prompt will ever match.
        """
        if not shared:
            return self._loose(self.root, tokens)
        node, at = self.match(tokens)
        if at < node.end:
            node = self._split(node, at - node.start)
        if at < len(tokens):
            leaf = self._node(node, at, tokens[at:])
            node.children[int(tokens[at])] = leaf
            return leaf
        if node.computed and node.missing == 0 and node.hidden is None and not node.ends:
            # The KV is there but not the last hidden state: compute the last token once more.
            above = node.parent
            if len(node.tokens) > 1:
                above = self._split(node, len(node.tokens) - 1)
            assert above is not None
            return self._loose(above, tokens[-1:])
        if node.folded:
            # A prompt ends here now, so it needs a segment; its children have one without it.
            above = node.kept_parent() or self.root
            return self._loose(above, tokens[above.end :])
        return node

    def _loose(self, parent: Node, tokens: Tokens) -> Node:
        node = self._node(parent, parent.end, tokens)
        node.folded = False
        parent.loose[node.id] = node
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Cut ``node`` after ``at`` of its tokens; returns the new upper node."""
        assert node.parent is not None
        upper = self._node(node.parent, node.start, node.tokens[:at])
        kv_start = node.kv_start
        node.parent.children[int(node.tokens[0])] = upper
        upper.children[int(node.tokens[at])] = node
        upper.folded, upper.readers, upper.active = node.folded, node.readers, node.active
        upper.last_use, upper.holders = node.last_use, node.holders
        node.parent, node.start, node.tokens = upper, node.start + at, node.tokens[at:]
        if node.segment is not None:
            held = upper.end - kv_start
            if node.segment.length > held:
                upper.segment = self.pool.cut(node.segment, held)
                for above in _upwards(upper):
                    above.holders += 1
            else:
                upper.segment, node.segment = node.segment, None
                del self.resident[node.id]
            self.resident[upper.id] = upper
        return upper

    def retain(self, leaf: Node) -> None:
        """One more sequence will read the path to ``leaf`` and sample from its end."""
        leaf.ends += 1
        for node in _upwards(leaf):
            node.readers += 1

    def release(self, leaf: Node) -> None:
        """A sequence of ``retain`` is finished."""
        for node in _upwards(leaf):
            node.readers -= 1
            assert node.readers >= node.active >= 0

    def activate(self, leaf: Node, step: int, by: int = 1) -> None:
        """Count ``by`` more running sequences on the path to ``leaf`` (``by=-1``: one fewer)."""
        for node in _upwards(leaf):
            node.active += by
            node.last_use = step

    def append(self, node: Node, tokens: int) -> NDArray[np.int64]:
        """Give ``node`` slots for ``tokens`` more of its tokens; int64 [tokens]."""
        if node.segment is None:
            node.segment = Segment()
            self.resident[node.id] = node
            self._count_holder(node, 1)
        return self.pool.append(node.segment, tokens)

    def evict(self, node: Node) -> None:
        """Free the node's KV. It must be idle, and no node below it may hold KV.

        The node stays in the tree until `prune`.
        """
        assert node.active == 0
        assert node.segment is not None
        assert node.holders == 0, "freed while nodes below read it"
        self.pool.release(node.segment)
        node.segment = None
        node.hidden = None
        del self.resident[node.id]
        self._count_holder(node, -1)

    def _count_holder(self, node: Node, by: int) -> None:
        for above in _upwards(node):
            if above is not node:
                above.holders += by

    def prune(self, node: Node) -> None:
        """Remove ``node`` and then its ancestors while they hold and serve nothing."""
        while node.parent is not None and not (
            node.readers or node.segment or node.children or node.loose
        ):
            parent = node.parent
            if parent.loose.pop(node.id, None) is None:
                del parent.children[int(node.tokens[0])]
            node = parent

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents first, without recursion."""
        stack = self.root.branches[::-1]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.branches[::-1])


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix of two token arrays."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


def _upwards(node: Node) -> Iterator[Node]:
    """``node`` and its ancestors, without the root."""
    while node.parent is not None:
        yield node
        node = node.parent
