"""What goes into the engine and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.decode.params import SamplingParams
from quire.decode.sampling import TokenLogprobs
from quire.errors import RequestError
from quire.kv.tree import Tokens


@dataclass(frozen=True)
class EngineRequest:
    """A tokenised request. ``id`` is unique in the engine; ``prompt`` int32, at least one token.

    ``seed`` starts the random numbers of its samples.
    """

    id: int
    prompt: Tokens
    params: SamplingParams
    seed: int
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass
class SampleResult:
    """One finished sample."""

    index: int
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class EngineResult:
    """A finished request: its samples in order, and how many prompt tokens shared KV served.

    ``prompt_logprobs`` has one entry a prompt token after the first, if asked for. With ``error``
    there are no samples.
    """

    id: int
    prompt_tokens: int
    cached_tokens: int
    samples: list[SampleResult]
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: RequestError | None = None
