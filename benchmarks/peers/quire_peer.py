"""Quire itself, through its Python interface: ``PYTHON quire_peer.py JOB.json``."""

from __future__ import annotations

from typing import Any

from common import Job, Request, main


class Quire:
    """All requests at once, under the default policy."""

    def __init__(self, job: Job) -> None:
        import quire

        self.version: str = quire.__version__
        self.job = job
        self.llm: Any = self._make()
        self.used = False

    def _make(self) -> Any:
        import quire

        return quire.LLM(
            self.job.checkpoint,
            dtype="bfloat16",
            weights={"bf16": None, "int8": "int8", "int4": "int4:32"}[self.job.precision],
            kv_memory=self.job.kv_limit,
            threads=self.job.threads,
        )

    def clear(self) -> None:
        """What has run the job is made again."""
        if self.used:
            self.llm.close()
            self.llm = self._make()
            self.run(self.job.warm_up())
        self.used = True

    def run(self, requests: list[Request]) -> int:
        """All requests at once."""
        from quire import SamplingParams

        found = self.llm.generate(
            [{"prompt_token_ids": r.prompt} for r in requests],
            [
                SamplingParams(
                    n=r.n,
                    temperature=0.0 if r.n == 1 else 1.0,
                    max_tokens=r.max_tokens,
                    ignore_eos=True,
                )
                for r in requests
            ],
        )
        errors = [output.error for output in found if output.error is not None]
        if errors:
            raise errors[0]
        return sum(len(sample.token_ids) for output in found for sample in output.outputs)


if __name__ == "__main__":
    main("quire", Quire, ("bf16", "int8", "int4"))
