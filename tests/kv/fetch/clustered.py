"""Nodes of keys in clusters and queries that ask for some of them, for tests of fetches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from quire.kv.method import Asked, Chosen, Entries, Facts, Index, Reader

SHAPES = [(1, 1), (4, 1), (4, 4), (8, 2)]  # heads, kv_heads


@dataclass
class Node:
    """A node at positions from ``start``, whose keys lie about ``topics`` directions a head.

    Of each layer: ``entries`` and ``queries`` ``[n, heads, head_dim]``, rotated already. Tokens
    change the topic now and then; a query asks for its own token's topic, or for ``about``.
    """

    facts: Facts
    n: int
    topics: int = 12
    start: int = 0
    noise: float = 0.3
    seed: int = 0
    entries: list[Entries] = field(init=False)
    queries: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        facts = self.facts
        self.centres = [
            2 * self.draw(facts.kv_heads, self.topics, facts.head_dim) for _ in range(facts.layers)
        ]
        change = torch.rand(self.n, generator=self.generator) < 0.05
        drawn = torch.randint(self.topics, (self.n,), generator=self.generator)
        last = torch.where(change, torch.arange(self.n), 0).cummax(0).values
        self.topic = drawn[last]
        positions = torch.arange(self.start, self.start + self.n).expand(facts.kv_heads, -1)
        self.entries, self.queries = [], []
        for centres in self.centres:
            keys = centres[:, self.topic]
            keys = keys + self.noise * 2 * self.draw(*keys.shape)
            values = self.draw(*keys.shape)
            self.entries.append(Entries(keys.to(facts.dtype), values.to(facts.dtype), positions))
        for layer in range(facts.layers):
            self.queries.append(self.ask(layer, self.topic))

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def ask(self, layer: int, about: Tensor) -> Tensor:
        """Queries ``[rows, heads, head_dim]`` about the topics ``[rows]``."""
        facts = self.facts
        centres = self.centres[layer][:, about].transpose(0, 1)  # [rows, kv_heads, head_dim]
        q = centres.repeat_interleave(facts.group, 1)
        return (q + self.noise * 2 * self.draw(*q.shape)).to(facts.dtype)

    def rows(self, layer: int, rows: int) -> Tensor:
        """Queries about random topics."""
        about = torch.randint(self.topics, (rows,), generator=self.generator)
        return self.ask(layer, about)

    def cut(self, counts: Sequence[int]) -> None:
        """Let only so many leading entries of each head be valid; what is not is absurd."""
        counted = torch.tensor(counts)
        hidden = torch.arange(self.n) >= counted[:, None]
        for layer, entries in enumerate(self.entries):
            keys = entries.keys.masked_fill(hidden[..., None], 50.0)
            self.entries[layer] = replace(entries, keys=keys, count=counted)

    def index(self, method: object, tokens: np.ndarray | None = None, window: bool = True) -> Index:
        """The method's index of the node."""
        found = self.maybe(method, tokens, window)
        assert found is not None
        return found

    def maybe(
        self, method: object, tokens: np.ndarray | None = None, window: bool = True
    ) -> Index | None:
        if tokens is None:
            tokens = np.zeros(self.start + self.n, dtype=np.int32)
        size = method.window if window else 0  # type: ignore[attr-defined]

        def queries(layer: int) -> Tensor:
            assert size or not window
            return self.queries[layer][self.n - min(size, self.n) :]

        make: Callable[..., Index | None] = method.index  # type: ignore[attr-defined]
        return make(self.facts, self.entries.__getitem__, tokens, queries)


def readers(rows: int, token: int = 5, position: int = 3000) -> list[Reader]:
    return [Reader(token, position, {}) for _ in range(rows)]


def asked(
    method: object, index: Index, layer: int, q: Tensor, rows: Sequence[Reader] = ()
) -> Chosen:
    """What the method chooses for ``q`` alone of a node with one ``index``."""
    question = Asked(0, len(q), index, 1 << 40)
    (found,) = method.choose(layer, q, rows, [question])  # type: ignore[attr-defined]
    assert isinstance(found, Chosen)
    return found


def chosen(found: Chosen) -> list[list[list[int]]]:
    """The single entries of each row and head; asserts that none is there twice."""
    assert found.size == 1
    places, mask = found.chunks, found.mask
    assert places.dtype == torch.int64
    assert mask is None or mask.dtype == torch.bool
    if mask is None:
        mask = torch.ones(places.shape, dtype=torch.bool)
    lists = [
        [places[row, head][mask[row, head]].tolist() for head in range(places.shape[1])]
        for row in range(len(places))
    ]
    for heads in lists:
        for one in heads:
            assert len(set(one)) == len(one)
    return lists


def attention(facts: Facts, entries: Entries, q: Tensor) -> Tensor:
    """Exact weights float64 ``[rows, heads, n]``."""
    keys = entries.keys.double().repeat_interleave(facts.group, 0)
    return (torch.einsum("rhd,hnd->rhn", q.double(), keys) * facts.scale).softmax(-1)


def mass(facts: Facts, entries: Entries, q: Tensor, places: list[list[list[int]]]) -> float:
    """The mean share of exact attention that the chosen entries have."""
    weights = attention(facts, entries, q)
    shares = [
        weights[row, query, places[row][query // facts.group]].sum()
        for row in range(len(q))
        for query in range(facts.heads)
    ]
    return float(torch.stack(shares).mean())


def at_random(places: list[list[list[int]]], n: int) -> list[list[list[int]]]:
    """As many places for each row and head, drawn from ``n``."""
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randperm(n, generator=generator)[: len(one)].tolist() for one in heads]
        for heads in places
    ]
