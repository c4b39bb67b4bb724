"""How a job is divided among workers: ``python benchmarks/fleet.py [--run]``.

For each workload and number of workers, three ways to divide it: Quire's cut, runs of as many rows
each in the order of the input, and row by row in turn. *balance* is the estimated work of the
busiest worker over the mean; *twice* is prompt tokens that more than one worker computes, over
those that one worker alone would compute; *time* is that of simulated workers which learn the
length of an output only at its end (uniform between 1 and the limit), over the time if nothing were
computed twice and nobody idle.

``--run`` also runs two real processes on the tiny shape and counts the tokens that they compute.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from quire.api.llm import LLM
from quire.bench.shapes import SHAPES, make_checkpoint
from quire.bench.simulated import Simulated
from quire.bench.workloads import WORKLOADS, Workload, make_workload
from quire.decode.params import SamplingParams
from quire.engine.request import EngineRequest
from quire.fleet.coordinator import Coordinator
from quire.fleet.cut import cut
from quire.fleet.processes import on_this_machine
from quire.fleet.share import Costs, Share, in_order

NAMES = ("shared", "two-level", "many-documents", "n-best", "long-prefix", "skewed")
WORKERS = (2, 4, 8, 16)
BATCH = 16  # requests that a simulated worker runs at once
MOMENT = 2000.0  # tokens of work between its reports

Division = Callable[[list[EngineRequest], int, Costs], list[list[EngineRequest]]]


def skewed() -> Workload:
    """24 documents of 256 to 4,096 tokens, the first with 96 questions, the k-th with 96 / k."""
    rng = np.random.default_rng(0)
    prompts = []
    for rank in range(1, 25):
        document = rng.integers(3, 32000, rng.integers(256, 4097))
        for _ in range(max(1, 96 // rank)):
            prompts.append(np.concatenate([document, rng.integers(3, 32000, 32)]).astype(np.int32))
    return Workload("skewed", [prompts[i] for i in rng.permutation(len(prompts))], 64)


def workload(name: str) -> Workload:
    """A workload of `quire bench`, or the skewed one."""
    return make_workload(name, 32000) if name in WORKLOADS else skewed()


def costs_of(name: str) -> Costs:
    """The costs of a shape's layers."""
    shape = SHAPES[name]
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    matrices = shape.hidden * (heads + 3 * shape.intermediate)
    return Costs(2 * shape.heads * shape.head_dim / matrices, shape.context)


def requests_of(job: Workload) -> list[EngineRequest]:
    """The workload's requests in the order of the input."""
    params = SamplingParams(max_tokens=job.output, n=job.samples, ignore_eos=True, seed=0)
    return [EngineRequest(i, prompt, params, 0) for i, prompt in enumerate(job.prompts)]


def by_tree(requests: list[EngineRequest], workers: int, costs: Costs) -> list[list[EngineRequest]]:
    """Quire's cut."""
    ordered = in_order(requests)
    parts = cut(Share.make(ordered, costs), [0.0] * workers)
    return [[ordered[i] for i in part] for part in parts]


def evenly(requests: list[EngineRequest], workers: int, _: Costs) -> list[list[EngineRequest]]:
    """As many rows for each, in the order of the input."""
    ends = [i * len(requests) // workers for i in range(workers + 1)]
    return [requests[ends[i] : ends[i + 1]] for i in range(workers)]


def in_turn(requests: list[EngineRequest], workers: int, _: Costs) -> list[list[EngineRequest]]:
    """Row by row in turn."""
    return [requests[i::workers] for i in range(workers)]


DIVISIONS: dict[str, Division] = {"quire": by_tree, "even runs": evenly, "in turn": in_turn}


@dataclass(frozen=True)
class Divided:
    """One division. ``balance``, ``twice`` and ``time`` as in the head of this file."""

    workload: str
    workers: int
    division: str
    balance: float
    twice: float
    time: float


def distinct(requests: Sequence[EngineRequest], share: Share) -> int:
    """Prompt tokens that one worker computes for ``requests``."""
    return sum(len(r.prompt) for r in requests) - int(share.common.sum())


def length(request: EngineRequest) -> int:
    """Output tokens that a request comes to."""
    return random.Random(request.id).randint(1, request.params.max_tokens or 1)


def ideal(requests: list[EngineRequest], costs: Costs) -> float:
    """The work of one worker that has all, with the outputs as long as they come."""
    share = Share.make(in_order(requests), costs)
    planned = sum(map(costs.outputs, requests))
    outputs = (r.params.n * costs.span(len(r.prompt), len(r.prompt) + length(r)) for r in requests)
    return share.cost(0, len(share)) - planned + sum(outputs)


def leveled(requests: list[EngineRequest], workers: int, costs: Costs) -> float:
    """The end of the last worker when the coordinator moves work to the idle."""
    transport = Simulated([1.0] * workers, costs, moment=MOMENT, batch=BATCH, outputs=length)
    coordinator = Coordinator(workers, costs)
    coordinator.add(requests)
    while coordinator.unfinished:
        for worker, command in coordinator.commands():
            transport.send(worker, command)
        for worker, message in transport.wait(0):
            coordinator.receive(worker, message)
    return max(worker.at for worker in transport.workers)


def divide(name: str, workers: int, division: str, costs: Costs) -> Divided:
    """Divide a workload and simulate the run; only Quire moves work after the start."""
    requests = requests_of(workload(name))
    parts = DIVISIONS[division](requests, workers, costs)
    shares = [Share.make(in_order(part), costs) for part in parts]
    work = [share.cost(0, len(share)) for share in shares]
    once = distinct(requests, Share.make(in_order(requests), costs))
    several = sum(distinct(part, share) for part, share in zip(parts, shares, strict=True))
    if division == "quire":
        end = leveled(requests, workers, costs)
    else:
        end = max(leveled(part, 1, costs) for part in parts)
    return Divided(
        name,
        workers,
        division,
        balance=max(work) * workers / sum(work),
        twice=(several - once) / once,
        time=end * workers / ideal(requests, costs),
    )


def run_two(name: str, scale: float) -> dict[str, float]:
    """Prompt tokens that real engines compute: one alone, two of a fleet, two with half each."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint("tiny", Path(folder))
        shutil.copy(str(files("quire") / "demo_model" / "tokenizer.json"), model)
        job = make_workload(name, SHAPES["tiny"].vocab, scale) if name in WORKLOADS else skewed()
        params = SamplingParams(
            temperature=0.0, max_tokens=job.output, n=job.samples, ignore_eos=True
        )
        rows = [
            ({"prompt_token_ids": [int(t) % 500 for t in prompt]}, params) for prompt in job.prompts
        ]
        found: dict[str, float] = {}
        options = {"kv_memory": "512MiB", "memory": "4GiB"}
        with LLM(model, **options) as llm:
            for way, halves in (
                ("one", [rows]),
                ("even runs", [rows[: len(rows) // 2], rows[len(rows) // 2 :]]),
                ("in turn", [rows[::2], rows[1::2]]),
            ):
                before = llm.stats.computed_tokens
                for half in halves:
                    list(llm.generate_iter(half))
                found[way] = llm.stats.computed_tokens - before
        with on_this_machine(model, workers=2, **options) as fleet:
            list(fleet.generate_iter(rows))
            found["quire"] = fleet.stats.computed_tokens
    return found


def main() -> None:
    """Print a table for each workload, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="also run two real processes")
    parser.add_argument("--scale", type=float, default=0.25, help="of the lengths with --run")
    asked = parser.parse_args()
    costs = costs_of("135m")
    results = []
    print("| workload | workers | " + " | ".join(f"{d}: balance, twice, time" for d in DIVISIONS))
    for name in NAMES:
        for workers in WORKERS:
            row = [divide(name, workers, division, costs) for division in DIVISIONS]
            results += row
            cells = [f"{d.balance:.2f}, {100 * d.twice:.0f}%, {d.time:.2f}" for d in row]
            print(f"| {name} | {workers} | " + " | ".join(cells) + " |", flush=True)
    runs = {}
    if asked.run:
        for name in NAMES:
            runs[name] = run_two(name, asked.scale)
            print(name, runs[name], flush=True)
    print(json.dumps({"divided": [asdict(result) for result in results], "runs": runs}))


if __name__ == "__main__":
    main()
