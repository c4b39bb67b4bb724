"""Generated workloads: token ids with the sharing structure of real batch jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Workload:
    """``prompts`` in order of arrival (shuffled), each sampled ``samples`` times.

    ``kv_share``: KV limit as a share of the optimum's prompt tokens plus all output; None: ample.
    """

    name: str
    prompts: list[Tokens]
    output: int
    samples: int = 1
    kv_share: float | None = None

    @property
    def asked_tokens(self) -> int:
        """Prompt tokens of all samples, as if nothing were shared."""
        return self.samples * sum(map(len, self.prompts))

    @property
    def optimum_tokens(self) -> int:
        """Prompt tokens that must be computed at least: the distinct prefixes."""
        keys = sorted(self.prompts, key=lambda p: p.astype(">i4").tobytes())
        distinct = sum(map(len, keys))
        for left, right in pairwise(keys):
            size = min(len(left), len(right))
            differs = (left[:size] != right[:size]).nonzero()[0]
            distinct -= int(differs[0]) if len(differs) else size
        return distinct

    @property
    def output_tokens(self) -> int:
        """Output tokens of all samples."""
        return self.output * self.samples * len(self.prompts)


def _shuffled(prompts: list[Tokens], rng: np.random.Generator) -> list[Tokens]:
    return [prompts[i] for i in rng.permutation(len(prompts))]


def shared(rng: np.random.Generator, vocab: int, scale: float) -> Workload:
    """Groups with a common prefix: 4 x 32 requests, 1,024 + 64 tokens, 64 out."""
    groups = [_tokens(rng, vocab, 1024 * scale) for _ in range(4)]
    prompts = [_join(g, _tokens(rng, vocab, 64 * scale)) for g in groups for _ in range(32)]
    return Workload("shared", _shuffled(prompts, rng), _size(64 * scale))


def two_level(rng: np.random.Generator, vocab: int, scale: float) -> Workload:
    """System prompt of 512, 8 documents of 1,024, 96 questions of 32 tokens, 64 out."""
    system = _tokens(rng, vocab, 512 * scale)
    documents = [_join(system, _tokens(rng, vocab, 1024 * scale)) for _ in range(8)]
    prompts = [_join(d, _tokens(rng, vocab, 32 * scale)) for d in documents for _ in range(12)]
    return Workload("two-level", _shuffled(prompts, rng), _size(64 * scale))


def n_best(rng: np.random.Generator, vocab: int, scale: float) -> Workload:
    """16 prompts of 512 tokens, 16 samples each, 64 out."""
    prompts = [_tokens(rng, vocab, 512 * scale) for _ in range(16)]
    return Workload("n-best", prompts, _size(64 * scale), samples=16)


def no_sharing(rng: np.random.Generator, vocab: int, scale: float) -> Workload:
    """64 unrelated prompts of 128 to 896 tokens, 64 out."""
    prompts = [_tokens(rng, vocab, rng.integers(128, 897) * scale) for _ in range(64)]
    return Workload("no-sharing", prompts, _size(64 * scale))


def long_prefix(rng: np.random.Generator, vocab: int, scale: float) -> Workload:
    """One prefix of 8,192 tokens, 48 readers with 32 tokens of their own, 64 out."""
    prefix = _tokens(rng, vocab, 8192 * scale)
    prompts = [_join(prefix, _tokens(rng, vocab, 32 * scale)) for _ in range(48)]
    return Workload("long-prefix", prompts, _size(64 * scale))


def many_documents(rng: np.random.Generator, vocab: int, scale: float) -> Workload:
    """24 documents of 1,024 tokens, 6 questions each, KV for half of them, 32 out."""
    documents = [_tokens(rng, vocab, 1024 * scale) for _ in range(24)]
    prompts = [_join(d, _tokens(rng, vocab, 32 * scale)) for d in documents for _ in range(6)]
    return Workload("many-documents", _shuffled(prompts, rng), _size(32 * scale), kv_share=0.5)


def single(rng: np.random.Generator, vocab: int, scale: float) -> Workload:
    """One request: 128 tokens, 128 out; decoding, bound by memory bandwidth."""
    return Workload("single", [_tokens(rng, vocab, 128 * scale)], _size(128 * scale))


def _size(tokens: float) -> int:
    return max(2, round(tokens))


def _tokens(rng: np.random.Generator, vocab: int, count: float) -> Tokens:
    return rng.integers(3, vocab, _size(count)).astype(np.int32)


def _join(*parts: Tokens) -> Tokens:
    return np.concatenate(parts)


WORKLOADS: dict[str, Callable[[np.random.Generator, int, float], Workload]] = {
    "shared": shared,
    "two-level": two_level,
    "n-best": n_best,
    "no-sharing": no_sharing,
    "long-prefix": long_prefix,
    "many-documents": many_documents,
    "single": single,
}


def make_workload(name: str, vocab: int, scale: float = 1.0) -> Workload:
    """A workload by name, always the same; lengths are multiplied by ``scale``."""
    return WORKLOADS[name](np.random.default_rng(len(name)), vocab, scale)
