"""The global planner: which shared spans get a segment, and in which order prompts run.

Both are exact and run once for each window of requests, in time linear in the tree.
Source: BatchLLM (arXiv 2412.03594), generalised from one level of sharing to any number.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from quire.kv.tree import Node, PrefixTree
from quire.schedule.state import Sequence

SEGMENT_COST = 16  # a segment must save computing at least this many tokens


def decide_segments(root: Node, cost: int = SEGMENT_COST) -> None:
    """Set ``folded`` on every node that has no decision yet, at least total cost.

    The cost of a tree is the number of tokens computed plus ``cost`` for each inner node kept.
    With ``g(v, D)`` the least cost below v when D tokens above it are folded into it::

        g(leaf, D) = D + len(leaf)
        g(v, D)    = min( D + len(v) + cost + sum_c g(c, 0),      keep
                          sum_c g(c, D + len(v)) )                fold

    A node where a prompt ends, or whose decision was made earlier, has no choice. Folding more
    than ``cost`` tokens never pays (at least two children would compute them), so D < cost and
    each node is visited a bounded number of times.
    """
    best: dict[tuple[int, int], int] = {}
    fold: dict[tuple[int, int], bool] = {}
    stack = [(child, 0, False) for child in root.branches]
    while stack:
        node, above, ready = stack.pop()
        key = (node.id, above)
        if key in best and not ready:
            continue
        span = above + len(node.tokens)
        branches = node.branches
        may_keep = node.folded is not True
        may_fold = node.folded is True or (
            node.folded is None and bool(branches) and not node.ends and span < cost
        )
        if not branches:
            best[key], fold[key] = span, False
            continue
        if not ready:
            stack.append((node, above, True))
            if may_keep:
                stack.extend((child, 0, False) for child in branches)
            if may_fold:
                stack.extend((child, span, False) for child in branches)
            continue
        price = 0 if node.folded is False else cost
        kept = span + price + sum(best[c.id, 0] for c in branches) if may_keep else None
        folded = sum(best[c.id, span] for c in branches) if may_fold else None
        fold[key] = kept is None or (folded is not None and folded < kept)
        best[key] = folded if fold[key] and folded is not None else kept or 0
    walk = [(child, 0) for child in root.branches]
    while walk:
        node, above = walk.pop()
        node.folded = fold[node.id, above]
        below = above + len(node.tokens) if node.folded else 0
        walk.extend((child, below) for child in node.branches)


def keep_all(root: Node) -> None:
    """Give every undecided node a segment."""
    stack = root.branches
    while stack:
        node = stack.pop()
        node.folded = bool(node.folded)
        stack.extend(node.branches)


def depth_first(root: Node, waiting: Seq[Sequence]) -> list[Sequence]:
    """The waiting sequences in depth-first order of the tree, decode-heavy subtrees first.

    At every level, subtrees of which something is computed already come first (their KV is freed
    sooner), then by falling R = output tokens wanted / prompt tokens still to be computed, so that
    the decodes of the first ride along with the prefills of the next; ties by arrival.
    """
    ending: dict[int, list[Sequence]] = {}
    wanted: dict[int, list[int]] = {}  # node id -> [output tokens, prompt tokens, first arrival]
    nodes: list[Node] = []
    for seq in waiting:
        ending.setdefault(seq.leaf.id, []).append(seq)
        node: Node | None = seq.leaf
        while node is not None and node.id not in wanted:
            missing = len(node.tokens) if node.segment is None else node.missing
            wanted[node.id] = [0, missing, seq.id]
            nodes.append(node)
            node = node.parent
        wanted[seq.leaf.id][0] += seq.max_new
    for node in sorted(nodes, key=lambda n: n.end, reverse=True):  # children before parents
        if node.parent is not None:
            mine, above = wanted[node.id], wanted[node.parent.id]
            above[0] += mine[0]
            above[1] += mine[1]
            above[2] = min(above[2], mine[2])

    def rank(node: Node) -> tuple[bool, float, int]:
        output, prompt, first = wanted[node.id]
        return node.segment is None, -output / max(prompt, 1), first

    ordered: list[Sequence] = []
    stack = [root]
    while stack:
        node = stack.pop()
        ordered.extend(sorted(ending.get(node.id, ()), key=lambda s: s.id))
        children = [c for c in node.branches if c.id in wanted]
        stack.extend(sorted(children, key=rank, reverse=True))
    return ordered


def computed_tokens(root: Node) -> int:
    """Prompt tokens that the decided tree computes, each segment once."""
    total = 0
    stack = [(child, 0) for child in root.branches]
    while stack:
        node, above = stack.pop()
        if not node.folded:
            total += above + len(node.tokens)
        below = above + len(node.tokens) if node.folded else 0
        stack.extend((child, below) for child in node.branches)
    return total


def distinct_tokens(tree: PrefixTree) -> int:
    """Tokens of the tree: what perfect sharing at every level would compute."""
    return sum(len(node.tokens) for node in tree.nodes())


def one_level_saving(root: Node) -> int:
    """Most prompt tokens that sharing on one level can save (the oracle of BatchLLM).

    ``f(leaf, D) = D``; ``f(v, D) = max(sum_c f(c, D), -depth(v) + sum_c f(c, depth(v)))`` with
    ``depth(v)`` the position after v. Leaves count once for every sequence that reads them.
    """
    best: dict[tuple[int, int], int] = {}
    stack = [(child, 0, False) for child in root.branches]
    while stack:
        node, shared, ready = stack.pop()
        branches = node.branches
        here = node.readers - sum(c.readers for c in branches)  # sequences that end at the node
        options = (shared, node.end)
        if not ready:
            stack.append((node, shared, True))
            stack.extend((c, d, False) for c in branches for d in options if (c.id, d) not in best)
            continue
        without, within = (here * d + sum(best[c.id, d] for c in branches) for d in options)
        best[node.id, shared] = max(without, within - node.end)
    return sum(best[child.id, 0] for child in root.branches)
