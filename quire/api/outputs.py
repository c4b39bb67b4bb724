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
    output.error = result.error
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
    """Work done since the LLM was made: running totals but for ``running``, ``waiting`` (sequences)
    and ``kv_used_bytes``, which hold now. Tokens, bytes, seconds.

    ``prompt_tokens`` counts the prompt of every sample that has an output, as if nothing were
    shared; ``computed_tokens`` is what was computed of prompts, ``recomputed_tokens`` the part
    computed again after preemption, ``loaded_tokens`` what was read from files instead;
    ``decode_tokens`` is what was computed of outputs. ``plan_seconds`` is the planner's and
    scheduler's share, ``step_seconds`` the steps' without the planning of windows. ``kv_bytes`` is
    the size of the KV pool.
    """

    steps: int = 0
    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    loaded_tokens: int = 0
    decode_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    plan_seconds: float = 0.0
    model_seconds: float = 0.0
    sample_seconds: float = 0.0
    step_seconds: float = 0.0
    kv_bytes: int = 0
    kv_used_bytes: int = 0
    peak_kv_bytes: int = 0

    @property
    def saved_tokens(self) -> int:
        """Prompt tokens that sharing saved."""
        return max(0, self.prompt_tokens - self.computed_tokens - self.loaded_tokens)

    @property
    def saved_share(self) -> float:
        """The part of the prompt tokens that sharing saved, 0 to 1."""
        return self.saved_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
