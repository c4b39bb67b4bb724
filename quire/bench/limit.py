"""How fast a workload could run on this machine at best: counted work over measured rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from quire.bench.workloads import Workload
from quire.models.spec import ModelSpec
from quire.weights.formats import ByChannel, Dense
from quire.weights.linear import make_product

SIZE = 2048  # of the square matrices that the rate is measured with
BUFFER = 256 << 20  # bytes read for the bandwidth; several times any cache


@dataclass(frozen=True)
class Machine:
    """Rates reached here: multiply-adds a second of large products, bytes a second read."""

    dense: float
    int8: float
    bandwidth: float


@dataclass(frozen=True)
class Work:
    """Least work of a workload with perfect prefix sharing.

    Multiply-adds of the layers' matrices, of the head and of attention; bytes that must stream:
    the weights once for each decode step of the largest batch, and the KV that each step reads.
    Of prompt tokens but the last, whose hidden states nobody reads, the last layer needs no more
    than keys and values.
    """

    layers: int
    head: int
    attention: int
    weight_bytes: int
    kv_bytes: int


def measure_machine() -> Machine:
    """Take the best of several runs of each; about two seconds."""
    x = torch.randn(SIZE, SIZE).bfloat16()
    weight = torch.randn(SIZE, SIZE).bfloat16()
    dense = make_product(Dense(weight), torch.bfloat16)
    levels = torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8)
    int8 = make_product(ByChannel(levels, torch.ones(SIZE)), torch.bfloat16)
    numbers = torch.zeros(BUFFER // 8, dtype=torch.int64)
    return Machine(
        SIZE**3 / _best(lambda: dense(x, None, None)),
        SIZE**3 / _best(lambda: int8(x, None, None)),
        BUFFER / _best(lambda: numbers.sum()),
    )


def _best(run: Callable[[], object], times: int = 12) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return min(taken)


def count_work(spec: ModelSpec, workload: Workload, weight_bytes: int, kv_token: int) -> Work:
    """The work of ``workload`` on a dense model. ``kv_token``: bytes of KV for a token."""
    q_width = spec.heads * spec.head_dim
    kv = spec.hidden_size * 2 * spec.kv_heads * spec.head_dim
    mlp = (3 if spec.gated else 2) * spec.intermediate_size
    layer = kv + spec.hidden_size * (2 * q_width + mlp)
    prompts = sorted(workload.prompts, key=lambda p: p.astype(">i4").tobytes())
    output, samples = workload.output, workload.samples
    distinct = ends = 0  # prompt tokens computed, and those of them that are a prompt's last
    pairs = last = 0  # (query, key) pairs of all tokens, and in the last layer
    before = np.empty(0, dtype=np.int32)
    for prompt in prompts:
        size = min(len(before), len(prompt))
        differs = (before[:size] != prompt[:size]).nonzero()[0]
        shared = int(differs[0]) if len(differs) else size
        distinct += len(prompt) - shared
        pairs += _triangle(len(prompt)) - _triangle(shared)
        if shared < len(prompt):
            ends += 1
            last += len(prompt)
        # The first output token comes from the prompt; the last one is never computed with.
        own = samples * (_triangle(len(prompt) + output - 1) - _triangle(len(prompt)))
        pairs += own
        last += own
        before = prompt
    sequences = samples * len(prompts)
    decoded = sequences * (output - 1)
    others = len(spec.layers) - 1
    # With less KV than the whole job needs, the decode steps of its parts follow each other.
    parts = 1 / (workload.kv_share or 1.0)
    outputs = sequences * _triangle(output - 1)
    return Work(
        layers=(distinct + decoded) * (layer * others + kv) + (ends + decoded) * (layer - kv),
        head=sequences * output * spec.hidden_size * spec.vocab_size,
        attention=(pairs * others + last) * 2 * q_width,
        weight_bytes=int(weight_bytes * output * parts),
        kv_bytes=int(kv_token * (output * distinct + outputs)),
    )


def least_seconds(work: Work, machine: Machine, *, int8: bool = False) -> float:
    """Seconds at the machine's rates; attention counts at the dense rate."""
    rate = machine.int8 if int8 else machine.dense
    products = (work.layers + work.head) / rate + work.attention / machine.dense
    return products + (work.weight_bytes + work.kv_bytes) / machine.bandwidth


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
