"""``transformers`` ``generate`` on padded batches: ``PYTHON transformers_peer.py JOB.json``."""

from __future__ import annotations

import os
from itertools import groupby
from typing import Any

from common import Job, Request, main

BATCH = int(os.environ.get("QUIRE_PEERS_BATCH", "16"))


class Transformers:
    """Batches of up to ``BATCH`` sequences of like length; every prompt is computed in full."""

    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        torch.set_num_threads(job.threads)
        self.version: str = transformers.__version__
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            job.checkpoint, dtype=torch.bfloat16
        )
        self.model.generation_config.eos_token_id = None
        self.most_tokens = job.kv_limit // job.token_bytes

    def clear(self) -> None:
        """Nothing is kept between calls."""

    def run(self, requests: list[Request]) -> int:
        """Longest prompts last; a batch has one ``n`` and one ``max_tokens``."""

        def kind(request: Request) -> tuple[int, int]:
            return request.n, request.max_tokens

        produced = 0
        ordered = sorted(requests, key=lambda r: (*kind(r), len(r.prompt)))
        for (n, _), same in groupby(ordered, key=kind):
            part: list[Request] = []
            for request in same:
                width = len(request.prompt) + request.max_tokens
                full = (len(part) + 1) * n > max(BATCH, n)
                if part and (full or (len(part) + 1) * n * width > self.most_tokens):
                    produced += self._generate(part)
                    part = []
                part.append(request)
            produced += self._generate(part)
        return produced

    def _generate(self, part: list[Request]) -> int:
        import torch

        n, count = part[0].n, part[0].max_tokens
        width = max(len(r.prompt) for r in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(part):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if n > 1 else {}
        with torch.inference_mode():
            found = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                num_return_sequences=n,
                pad_token_id=0,
                **(sampling or {"do_sample": False}),
            )
        return int(found[:, width:].numel())


if __name__ == "__main__":
    main("transformers", Transformers, ("bf16",))
