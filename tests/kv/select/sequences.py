"""Sequences of random queries and keys, held and decoded token by token, for tests of selections.

Everything here is loops in float64: the reference that methods are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import toy
from quire.kv.method import Entries, Facts, Seen, pad

SHAPES = [(1, 1), (4, 1), (4, 4), (8, 2)]  # heads, kv_heads


def make_facts(
    heads: int = 4,
    kv_heads: int = 1,
    layers: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
) -> Facts:
    """Of a model so small that loops in Python are fast enough."""
    return toy.make_facts(heads, kv_heads, layers, head_dim, dtype, softcap=softcap)


@dataclass
class Sequence:
    """Of each layer: ``queries`` [total, heads, d], ``keys``, ``values`` [kv_heads, total, d].

    ``held[layer][head]`` are the tokens whose entries it holds. ``mass[layer][head][token]`` is
    the attention that a held token has received.
    """

    facts: Facts
    prompt: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    tokens: int = 0
    held: list[list[list[int]]] = field(default_factory=list)
    mass: list[list[dict[int, float]]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, facts: Facts, prompt: int, total: int | None = None, seed: int = 0) -> Sequence:
        generator = torch.Generator().manual_seed(seed)
        total = total or prompt

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        keys = draw(facts.layers, facts.kv_heads, total, facts.head_dim)
        made = cls(
            facts,
            prompt,
            2 * draw(facts.layers, total, facts.heads, facts.head_dim),
            keys.to(facts.dtype),
            draw(*keys.shape).to(facts.dtype),
            held=[[[] for _ in range(facts.kv_heads)] for _ in range(facts.layers)],
            mass=[[{} for _ in range(facts.kv_heads)] for _ in range(facts.layers)],
        )
        for _ in range(prompt):
            made.step()
        return made

    def step(self) -> None:
        """Compute one more token."""
        token, self.tokens = self.tokens, self.tokens + 1
        for layer in range(self.facts.layers):
            for head in range(self.facts.kv_heads):
                held, mass = self.held[layer][head], self.mass[layer][head]
                held.append(token)
                mass[token] = 0.0
                for query in range(head * self.facts.group, (head + 1) * self.facts.group):
                    for key, weight in self.weights(layer, query, token).items():
                        mass[key] += weight

    def weights(self, layer: int, query: int, token: int) -> dict[int, float]:
        """Attention that the query head ``query`` of a token gives to what is held before it."""
        head = query // self.facts.group
        q = self.queries[layer, token, query].double()
        scores = {}
        for key in self.held[layer][head]:
            if key <= token:
                score = float(q @ self.keys[layer, head, key].double()) * self.facts.scale
                cap = self.facts.softcap
                scores[key] = score if cap is None else cap * math.tanh(score / cap)
        total = sum(math.exp(s) for s in scores.values())
        return {key: math.exp(s) / total for key, s in scores.items()}

    def seen(self, window: int = 0) -> Seen:
        """What a method is given."""

        def entries(layer: int) -> Entries:
            heads = []
            for head, tokens in enumerate(self.held[layer]):
                at = torch.tensor(tokens)
                keys, values = self.keys[layer, head, at], self.values[layer, head, at]
                heads.append(Entries(keys[None], values[None], at[None]))
            return pad(heads)

        def mass(layer: int) -> Tensor:
            both = zip(self.mass[layer], self.held[layer], strict=True)
            rows = [[mass[t] for t in held] for mass, held in both]
            longest = max(map(len, rows))
            return torch.tensor([row + [0.0] * (longest - len(row)) for row in rows])

        def queries(layer: int) -> Tensor:
            first = max(0, self.tokens - window)
            return self.queries[layer, first : self.tokens].to(self.facts.dtype)

        return Seen(self.facts, self.prompt, self.tokens, entries, queries, mass, self.state)

    def keep(self, found: list[list[Tensor]] | None) -> None:
        """Hold only what a method has chosen."""
        for layer, heads in enumerate(found or []):
            for head, index in enumerate(heads):
                assert index.dtype == torch.int64
                assert index.tolist() == sorted(set(index.tolist()))
                self.held[layer][head] = [self.held[layer][head][i] for i in index.tolist()]

    def decode(self, method: Any) -> list[list[list[list[int]]]]:
        """Decode to the end, selecting as the engine does; what was held after each token."""
        history = []
        self.keep(method.select(self.seen(method.window)))
        last = self.tokens
        while self.tokens < self.queries.shape[1]:
            self.step()
            if method.every is not None and self.tokens - last >= method.every:
                self.keep(method.select(self.seen(method.window)))
                last = self.tokens
            history.append([[list(held) for held in heads] for heads in self.held])
        return history


def every_head(facts: Facts) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(facts.layers) for head in range(facts.kv_heads)]


def top(tokens: list[int], score: Callable[[int], float], count: int) -> list[int]:
    """The ``count`` tokens with the highest score, the newer of equals, ascending."""
    return sorted(sorted(tokens, key=lambda t: (score(t), t), reverse=True)[:count])
