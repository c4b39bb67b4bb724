"""What a job needs of whatever runs its requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from quire.api.outputs import RequestOutput, Stats
from quire.api.setup import Prompt, Setup
from quire.decode.params import SamplingParams
from quire.models.tokenizer import Tokenizer


class Generator(Protocol):
    """Runs requests to their end: an `LLM`, or a `Fleet` of them."""

    model: str
    policy: str
    setup: Setup
    tokenizer: Tokenizer

    @property
    def stats(self) -> Stats:
        """Work done so far."""
        ...

    def generate_iter(
        self,
        requests: Iterable[tuple[Prompt, SamplingParams]],
        *,
        on_step: Callable[[Stats], None] | None = None,
    ) -> Iterator[RequestOutput]:
        """Yield each request's output as it finishes; ``request_id`` is its place in the input."""
        ...
