"""What running all layers in one native call saves, by the number of rows.

``python benchmarks/fused.py [--shape 135m] [--weights int8]`` prints a Markdown table: milliseconds
of a decode step's layers and of its head, the former one kernel at a time and all in one call, in
turn, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from quire.bench.shapes import make_checkpoint
from quire.decode.params import SamplingParams
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.engine.world import Work
from quire.kernels import native
from quire.kernels.sampling import argmax
from quire.models.decoder import Decoder
from quire.models.loader import load_model
from quire.schedule.policies import POLICIES
from quire.weights.quantise import parse


def decode_step(model: Decoder, rows: int, context: int) -> tuple[Engine, Sequence[Work]]:
    """An engine in the midst of decoding ``rows`` requests, and the work of its last step."""
    engine = Engine(model, None, policy=POLICIES["batch"], kv_bytes=1 << 30, chunk=1 << 15)
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    vocab = model.spec.vocab_size
    engine.add(
        EngineRequest(i, rng.integers(0, vocab, context).astype(np.int32), params, i)
        for i in range(rows)
    )
    last: list[Sequence[Work]] = []
    forward = engine.runner.forward

    def record(works: Sequence[Work], wanted: Sequence[int]) -> torch.Tensor:
        last.append(works)
        return forward(works, wanted)

    engine.runner.forward = record  # type: ignore[method-assign]
    while not last or len(last[-1]) < rows or any(w.item.count > 1 for w in last[-1]):
        engine.step()
    engine.runner.forward = forward  # type: ignore[method-assign]
    return engine, last[-1]


def medians(ways: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Milliseconds of each, called in turn."""
    found: list[list[float]] = [[] for _ in ways]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(found[0]) < 5:
        for way, times in zip(ways, found, strict=True):
            started = time.perf_counter()
            way()
            times.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(times) for times in found]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--weights", help="int8, int4, ...")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4, 16, 64, 128])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    native.configure()
    asked = None if args.weights is None else parse(args.weights)
    with torch.inference_mode():
        report(args, load_model(make_checkpoint(args.shape, args.folder), weights=asked))


def report(args: argparse.Namespace, model: Decoder) -> None:
    """Print the table."""
    print("| rows | one by one, ms | in one call, ms | ratio | head, ms |")
    print("|---" * 5 + "|")
    for rows in args.rows:
        engine, works = decode_step(model, rows, args.context)
        runner = engine.runner
        fused = runner.fused

        def one_by_one() -> None:
            runner.fused = None  # noqa: B023
            runner.forward(works)  # noqa: B023

        def at_once() -> None:
            runner.fused = fused  # noqa: B023
            runner.forward(works)  # noqa: B023

        hidden = runner.forward(works)  # [rows, hidden]

        def head() -> None:
            argmax(model.logits(hidden))  # noqa: B023

        old, new, last = medians((one_by_one, at_once, head), args.seconds)
        print(f"| {rows} | {old:.2f} | {new:.2f} | {old / new:.2f} | {last:.2f} |", flush=True)


if __name__ == "__main__":
    main()
