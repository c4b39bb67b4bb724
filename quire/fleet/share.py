"""Requests in the order of the prefix tree, and what it costs to run any run of them.

Prompts sorted token by token are the leaves of the prefix tree from left to right. A worker that
runs some consecutive ones computes each shared span once, so request i adds what it does not have
in common with request i - 1, and the first of the run all of its prompt. That makes the cost of any
run, and of a cut at any place, a matter of two arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.engine.request import EngineRequest
from quire.kv.tree import common_prefix
from quire.models.spec import ModelSpec


@dataclass(frozen=True)
class Costs:
    """Estimated work, in tokens: the work of the model's matrices on one token is 1.

    ``attention``: work of one token's attention to one earlier token; ``context``: longest
    sequence; ``output``: the part of their output limit that requests use, 0 to 1.
    """

    attention: float = 0.0
    context: int = 1 << 30
    output: float = 1.0

    @classmethod
    def of(cls, spec: ModelSpec) -> Costs:
        """Costs by the multiply-adds of ``spec``; what is bounded by a window counts as nothing."""
        matrices = attention = 0
        for layer in spec.layers:
            experts = layer.experts
            width = (
                spec.intermediate_size if experts is None else experts.top * experts.intermediate
            )
            projections = 2 * (spec.heads + spec.kv_heads) * spec.head_dim
            matrices += spec.hidden_size * (projections + (3 if spec.gated else 2) * width)
            attention += 2 * spec.heads * spec.head_dim if layer.window is None else 0
        return cls(attention / matrices, spec.context)

    def span(self, start: float, end: float) -> float:
        """The cost of computing the tokens ``[start, end)`` of a sequence."""
        return (end - start) + self.attention * (end**2 - start**2) / 2

    def limit(self, request: EngineRequest) -> int:
        """The most output tokens that a sample of ``request`` may have."""
        room = self.context - len(request.prompt)
        return min(request.params.max_tokens or room, room)

    def outputs(self, request: EngineRequest) -> float:
        """The expected cost of all samples' outputs."""
        prompt, tokens = len(request.prompt), max(1.0, self.output * self.limit(request))
        return request.params.n * self.span(prompt, prompt + tokens)


@dataclass(frozen=True)
class Share:
    """What consecutive requests cost.

    ``common`` int64 [n + 1]: prompt tokens that request i has in common with the one before it (0
    for the first, and for the place after the last); ``shared`` float64 [n + 1]: their cost;
    ``total`` float64 [n + 1]: cost of requests [0, i) run together. Costs are those of `Costs`.
    """

    common: NDArray[np.int64]
    shared: NDArray[np.float64]
    total: NDArray[np.float64]

    @classmethod
    def make(cls, requests: Sequence[EngineRequest], costs: Costs) -> Share:
        """``requests`` in any depth-first order of their prefix tree, such as `in_order`."""
        count = len(requests)
        common, shared, total = np.zeros(count + 1, np.int64), np.zeros(count + 1), [0.0]
        for i, request in enumerate(requests):
            if i and shares(requests[i - 1]) and shares(request):
                common[i] = common_prefix(requests[i - 1].prompt, request.prompt)
            shared[i] = costs.span(0, int(common[i]))
            own = costs.span(int(common[i]), len(request.prompt)) + costs.outputs(request)
            total.append(total[-1] + own)
        return cls(common, shared, np.array(total))

    def __len__(self) -> int:
        return len(self.total) - 1

    def cost(self, start: int, end: int) -> float:
        """The cost of requests [start, end) for a worker that has nothing of them."""
        if end == start:
            return 0.0
        return float(self.shared[start] + self.total[end] - self.total[start])


def shares(request: EngineRequest) -> bool:
    """Whether the request uses KV that others computed; one that scores its prompt does not."""
    return request.params.prompt_logprobs is None


def in_order(requests: Sequence[EngineRequest]) -> list[EngineRequest]:
    """``requests`` sorted by prompt, token by token; those that share with nobody at the end."""
    return sorted(requests, key=lambda r: (not shares(r), r.prompt.astype(">i4").tobytes()))
