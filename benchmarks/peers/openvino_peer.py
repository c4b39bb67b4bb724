"""OpenVINO GenAI with continuous batching: ``PYTHON openvino_peer.py JOB.json``.

``PYTHON openvino_peer.py --convert CHECKPOINT FOLDER PRECISION`` makes what it reads.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import Job, PeerError, Request, main, once
from prefixes import Admission

BLOCK_TOKENS = 32
STEP_TOKENS = 512
GROUP = 32  # inputs with a scale of their own, in int4


class OpenVino:
    """Continuous batching with its prefix cache, KV cache and arithmetic in bfloat16."""

    def __init__(self, job: Job) -> None:
        import openvino_genai

        self.version: str = openvino_genai.__version__
        self.job = job
        target = job.cache / f"{job.checkpoint.name}-openvino-{job.precision}"
        self.folder = once(target, lambda folder: _convert_aside(job, folder))
        self.pipeline = self._make()
        self.used = False
        self.started = 0

    def _make(self) -> Any:
        import openvino_genai

        job = self.job
        config = openvino_genai.SchedulerConfig()
        config.enable_prefix_caching = True
        config.max_num_batched_tokens = STEP_TOKENS
        config.num_kv_blocks = max(
            job.kv_limit // (BLOCK_TOKENS * job.token_bytes), -(-job.longest // BLOCK_TOKENS) + 1
        )
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "bf16",
            "INFERENCE_NUM_THREADS": job.threads,
        }
        return openvino_genai.ContinuousBatchingPipeline(
            str(self.folder), config, "CPU", properties
        )

    def clear(self) -> None:
        """The cache cannot be emptied, so a pipeline that has run the job is made again."""
        if self.used:
            self.pipeline = None
            self.pipeline = self._make()
            self.run(self.job.warm_up())
        self.used = True

    def run(self, requests: list[Request]) -> int:
        """All requests, as soon as what they share has been computed.

        The prefix cache is asked once, when a request arrives: of requests that come together,
        each would compute the whole prompt.
        """
        import openvino
        from openvino_genai import GenerationStatus

        ordered = sorted(requests, key=lambda r: r.prompt)
        prompts = [np.array(r.prompt, np.int64) for r in ordered]
        outputs = [r.n * (r.max_tokens + BLOCK_TOKENS) for r in ordered]
        cells = self.job.kv_limit // self.job.token_bytes
        admission = Admission(prompts, outputs, cells, BLOCK_TOKENS)
        handles: dict[int, Any] = {}
        produced = 0
        while admission.waiting or admission.running:
            for member in admission.next():
                self.started += 1
                handles[member] = self.pipeline.add_request(
                    self.started, openvino.Tensor(prompts[member][None]), _config(ordered[member])
                )
            self.pipeline.step()
            for member in list(admission.running):
                handle = handles[member]
                status = handle.get_status()
                if status == GenerationStatus.FINISHED:
                    produced += sum(len(o.generated_ids) for o in handle.read_all())
                    admission.finish(member)
                elif status != GenerationStatus.RUNNING:
                    raise PeerError(f"a request ended as {status}")
                elif handle.can_read():
                    admission.computed.add(member)
        return produced


def _config(request: Request) -> Any:
    from openvino_genai import GenerationConfig

    config = GenerationConfig(max_new_tokens=request.max_tokens, ignore_eos=True)
    if request.n > 1:
        config.do_sample = True
        config.temperature = 1.0
        config.num_return_sequences = request.n
    return config


def _convert_aside(job: Job, folder: Path) -> None:
    """Convert in a process of its own, so that its memory is not counted."""
    command = [sys.executable, __file__, "--convert", job.checkpoint, folder, job.precision]
    done = subprocess.run(list(map(str, command)), check=False)
    if done.returncode != 0:
        raise PeerError(f"the conversion ended with {done.returncode}")


def convert(checkpoint: Path, folder: Path, precision: str) -> None:
    """Export a checkpoint: bfloat16, or symmetric int8 by channel, or symmetric int4 by group."""
    import torch
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    options: dict[str, Any] = {"load_in_8bit": False}
    if precision == "int8":
        options = {"quantization_config": OVWeightQuantizationConfig(bits=8, sym=True)}
    elif precision == "int4":
        config = OVWeightQuantizationConfig(bits=4, sym=True, group_size=GROUP, ratio=1.0)
        options = {"quantization_config": config}
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, dtype=torch.bfloat16, **options
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main("openvino", OpenVino, ("bf16", "int8", "int4"))
