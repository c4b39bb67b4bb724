"""Time to plan a window of 100,000 prompts of 1,000 tokens: ``python benchmarks/plan_window.py``.

2,000 documents of 900 tokens, 50 questions of 100 tokens each, shuffled. No tensors are involved.
The last line is JSON.
"""

from __future__ import annotations

import json
import time

import numpy as np

from quire.engine.world import World
from quire.schedule.policies import POLICIES

REQUESTS, DOCUMENTS = 100_000, 2_000


def main() -> None:
    """Build the prompts, plan them once, print the time."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 32000, 900).astype(np.int32) for _ in range(DOCUMENTS)]
    prompts = [
        np.concatenate([documents[i % DOCUMENTS], rng.integers(0, 32000, 100).astype(np.int32)])
        for i in rng.permutation(REQUESTS)
    ]
    world = World(pages=200_000, page_tokens=16, chunk=512, policy=POLICIES["batch"])
    started = time.perf_counter()
    world.add((i, prompt, 1, 64, True) for i, prompt in enumerate(prompts))
    seconds = time.perf_counter() - started
    print(f"planned {REQUESTS:,} requests of 1,000 tokens in {seconds:.1f} s")
    print(json.dumps({"requests": REQUESTS, "tokens": 1000, "seconds": seconds}))


if __name__ == "__main__":
    main()
