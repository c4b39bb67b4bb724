"""vLLM on CPU with its prefix cache on: ``PYTHON vllm_peer.py JOB.json``."""

from __future__ import annotations

from typing import Any

from common import Job, PeerError, Request, main, once
from tensors import write_int8

SMALLEST_HEAD = 32


def environment(job: Job) -> dict[str, str]:
    """Threads on the first cores, nothing from outside."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{job.threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


class Vllm:
    """vLLM's offline interface; the scheduler and the batch sizes are its own."""

    def __init__(self, job: Job) -> None:
        import vllm

        self.version: str = vllm.__version__
        checkpoint = job.checkpoint
        if job.config["head_dim"] < SMALLEST_HEAD:
            raise PeerError(f"its attention needs heads of at least {SMALLEST_HEAD} numbers")
        if job.precision == "int8":
            target = job.cache / f"{checkpoint.name}-int8"
            checkpoint = once(target, lambda folder: write_int8(job.checkpoint, folder))
        self.llm: Any = vllm.LLM(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=job.longest,
            enable_prefix_caching=True,
            kv_cache_memory_bytes=max(job.kv_limit, (job.longest + 256) * job.token_bytes),
            disable_log_stats=True,
        )

    def clear(self) -> None:
        """Empty the prefix cache."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not cleared")

    def run(self, requests: list[Request]) -> int:
        """All requests at once."""
        from vllm import SamplingParams, TokensPrompt

        found = self.llm.generate(
            [TokensPrompt(prompt_token_ids=r.prompt) for r in requests],
            [
                SamplingParams(
                    n=r.n,
                    temperature=0.0 if r.n == 1 else 1.0,
                    max_tokens=r.max_tokens,
                    ignore_eos=True,
                    detokenize=False,
                )
                for r in requests
            ],
            use_tqdm=False,
        )
        return sum(len(sample.token_ids) for output in found for sample in output.outputs)


if __name__ == "__main__":
    main("vllm", Vllm, ("bf16", "int8"), environment)
