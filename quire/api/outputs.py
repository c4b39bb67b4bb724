"""What `LLM.generate` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.decode.sampling import TokenLogprobs
from quire.engine.request import EngineResult
from quire.errors import RequestError


@dataclass
class CompletionOutput:
    """One sample. ``finish_reason``: ``"stop"`` or ``"length"``.

    ``logprobs`` has an entry a token if asked for; ``cumulative_logprob`` is their sum.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: str


@dataclass
class RequestOutput:
    """A finished request. ``request_id`` counts the requests of the call from 0.

    ``cached_tokens``: prompt tokens served from shared KV. A request that could not run has
    ``error`` set and no ``outputs``.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    error: RequestError | None = None


def complete(output: RequestOutput, result: EngineResult) -> RequestOutput:
    """Fill in what the engine found; returns ``output``."""
    output.cached_tokens = result.cached_tokens
    output.prompt_logprobs = result.prompt_logprobs
    for sample in result.samples:
        scored = sample.logprobs or None
        total = sum(entry.logprob for entry in scored) if scored is not None else None
        output.outputs.append(
            CompletionOutput(
                sample.index, sample.text, sample.token_ids, total, scored, sample.finish_reason
            )
        )
    return output


@dataclass(frozen=True)
class Stats:
    """Work done since the LLM was made. Tokens, bytes, seconds.

    ``prompt_tokens`` counts every sample's prompt as if nothing were shared; ``computed_tokens``
    is what was computed of them, ``recomputed_tokens`` the part computed again after preemption.
    ``plan_seconds`` is the planner's and scheduler's share.
    """

    steps: int
    running: int
    waiting: int
    prompt_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    output_tokens: int
    preemptions: int
    plan_seconds: float
    model_seconds: float
    sample_seconds: float
    kv_bytes: int
    peak_kv_bytes: int

    @property
    def saved_tokens(self) -> int:
        """Prompt tokens that sharing saved."""
        return max(0, self.prompt_tokens - self.computed_tokens)
