"""What KV in files saves: a job of documents, run without, while they are filled, and from them.

``python benchmarks/kv_dir.py [--shape 135m] [--documents N] [--tokens N] [--folder F]``: each of N
documents of that many random tokens has four questions. Three runs of a fresh engine, in turn, as
often as asked: without a folder; with an empty one; with the one that this has filled. Prints
seconds, ratios to the first, and the tokens that were computed and loaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from importlib.resources import files
from pathlib import Path

import numpy as np

from quire import LLM, SamplingParams
from quire.bench.shapes import SHAPES, make_checkpoint

QUESTIONS, QUESTION = 4, 32  # of each document, and their tokens


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("bench-out"), help="of the checkpoint")
    parser.add_argument("--shape", default="135m", choices=list(SHAPES))
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    checkpoint = make_checkpoint(args.shape, args.folder)
    shutil.copy(str(files("quire") / "demo_model" / "tokenizer.json"), checkpoint)
    kept = args.folder / "kv-dir"
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(args.documents):
        document = rng.integers(1, 1000, args.tokens)
        for _ in range(QUESTIONS):
            ids = [*document.tolist(), *rng.integers(1, 1000, QUESTION).tolist()]
            prompts.append({"prompt_token_ids": ids})
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)

    def run(folder: Path | None) -> dict[str, float]:
        started = time.perf_counter()
        with LLM(checkpoint, kv_dir=folder) as llm:
            loaded = time.perf_counter()
            llm.generate(prompts, params)
            done = time.perf_counter()
            stats = llm.stats
        closed = time.perf_counter()
        return {
            "start": loaded - started,
            "seconds": done - loaded,
            "close": closed - done,
            "computed": stats.computed_tokens,
            "loaded": stats.loaded_tokens,
        }

    found: dict[str, list[dict[str, float]]] = {"without": [], "filling": [], "filled": []}
    for _ in range(args.repeats):
        shutil.rmtree(kept, ignore_errors=True)
        for name, folder in (("without", None), ("filling", kept), ("filled", kept)):
            found[name].append(run(folder))
    size = sum(path.stat().st_size for path in kept.glob("*/*.kv"))
    shutil.rmtree(kept)
    base = statistics.median(row["seconds"] for row in found["without"])
    print(f"{len(prompts)} prompts of {args.tokens + QUESTION} tokens, {size / 1e6:,.0f} MB kept")
    for name, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(
            f"{name:9}{middle['seconds']:8.2f} s  {middle['seconds'] / base:5.2f}x  "
            f"{middle['computed']:9,.0f} computed {middle['loaded']:9,.0f} loaded  "
            f"(closing {middle['close']:.2f} s)"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
