"""Run a workload under each policy, and through transformers, in one process and one run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from quire.bench.limit import Machine, count_work, least_seconds
from quire.bench.workloads import Workload
from quire.decode.params import SamplingParams
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.kv.arena import token_bytes
from quire.models.loader import load_model
from quire.schedule.policies import POLICIES
from quire.weights.quantise import Asked

AMPLE_KV_BYTES = 6 << 30


@dataclass(frozen=True)
class Measured:
    """One system on one workload. Seconds, tokens, bytes; ``plan_share``: part of the time spent
    in planner and scheduler."""

    system: str
    workload: str
    seconds: float
    tokens_per_second: float  # prompt tokens asked for and output tokens
    computed_tokens: int
    optimum_tokens: int
    tokens_per_step: float
    plan_share: float
    outside_model_share: float
    peak_kv_bytes: int
    limit_seconds: float | None = None  # least time at this machine's rates


def run_policy(
    policy: str,
    folder: Path,
    workload: Workload,
    *,
    dtype: torch.dtype | None = None,
    chunk: int = 512,
    device: str = "cpu",
    weights: Asked | None = None,
    deterministic: bool = False,
    machine: Machine | None = None,
) -> Measured:
    """Run the workload to its end under ``policy``; greedy, ``workload.output`` tokens each."""
    model = load_model(
        folder, dtype=dtype, device=device, weights=weights, deterministic=deterministic
    )
    spec = model.spec
    size = token_bytes(len(spec.layers), spec.kv_heads, spec.head_dim, model.dtype)
    kv_bytes = AMPLE_KV_BYTES
    if workload.kv_share is not None:
        kv_bytes = (
            int(workload.kv_share * (workload.optimum_tokens + workload.output_tokens)) * size
        )
    engine = Engine(
        model,
        None,
        policy=POLICIES[policy],
        kv_bytes=kv_bytes,
        chunk=chunk,
        deterministic=deterministic,
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=workload.output, ignore_eos=True, n=workload.samples
    )
    started = time.perf_counter()
    engine.add(EngineRequest(i, p, params, seed=i) for i, p in enumerate(workload.prompts))
    while engine.unfinished:
        engine.step()
    seconds = time.perf_counter() - started
    counters, times = engine.world.counters, engine.times
    return Measured(
        system=policy,
        workload=workload.name,
        seconds=seconds,
        tokens_per_second=(workload.asked_tokens + counters.output) / seconds,
        computed_tokens=counters.prompt_computed,
        optimum_tokens=workload.optimum_tokens,
        tokens_per_step=(counters.prompt_computed + counters.output) / engine.world.steps,
        plan_share=(times.insert + times.plan) / seconds,
        outside_model_share=1 - times.model / seconds,
        peak_kv_bytes=engine.world.pool.peak_pages * engine.limits.page_bytes,
        limit_seconds=None
        if machine is None
        else least_seconds(
            count_work(spec, workload, model.nbytes, size),
            machine,
            int8=weights is not None and weights.bits == 8,
        ),
    )


def run_transformers(
    folder: Path,
    workload: Workload,
    *,
    batch: int = 16,
    most_tokens: int = 16384,
    device: str = "cpu",
) -> Measured:
    """``transformers`` generate on padded batches of ``batch`` sequences of like length.

    Runs the first prompts, up to ``most_tokens`` tokens with their samples; the speed is theirs.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    count = max(1, most_tokens * len(workload.prompts) // workload.asked_tokens)
    prompts = sorted(workload.prompts[:count], key=len)
    asked = 0
    started = time.perf_counter()
    per_call = max(1, batch // workload.samples)
    for first in range(0, len(prompts), per_call):
        part = prompts[first : first + per_call]
        width = max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(part):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            model.generate(
                ids.repeat_interleave(workload.samples, 0),
                attention_mask=mask.repeat_interleave(workload.samples, 0),
                max_new_tokens=workload.output,
                min_new_tokens=workload.output,
                do_sample=False,
                pad_token_id=0,
            )
        asked += workload.samples * sum(map(len, part))
    seconds = time.perf_counter() - started
    output = workload.output * workload.samples * len(prompts)
    return Measured(
        system="transformers",
        workload=workload.name,
        seconds=seconds,
        tokens_per_second=(asked + output) / seconds,
        computed_tokens=asked,
        optimum_tokens=workload.optimum_tokens,
        tokens_per_step=0.0,
        plan_share=0.0,
        outside_model_share=0.0,
        peak_kv_bytes=0,
    )
