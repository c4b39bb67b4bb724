"""From rows to engine requests: read, tokenize, check, seed. No weights and no engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Literal

import numpy as np

from quire.api.outputs import RequestOutput
from quire.api.setup import Prompt, Setup
from quire.decode.grammar import Grammars
from quire.decode.params import SamplingParams
from quire.decode.rng import row_seed
from quire.engine.request import EngineRequest
from quire.errors import InvalidRequestError, PromptTooLongError, RequestError

Numbered = tuple[int, tuple[Prompt, SamplingParams]]
Prepared = tuple[RequestOutput, EngineRequest | None]
Overlong = Literal["error", "truncate-left", "truncate-right", "fail"]
OVERLONG: tuple[Overlong, ...] = ("error", "truncate-left", "truncate-right", "fail")


@dataclass(frozen=True)
class Preparer:
    """Makes engine requests for ``setup``; ``grammars`` checks their structures.

    ``seed``: a request without a seed gets one from this and its place in the input.
    ``on_overlong``: what to do with a prompt that leaves no room in the context.
    """

    setup: Setup
    grammars: Grammars
    seed: int = 0
    on_overlong: Overlong = "error"

    def window(self, source: Iterator[Numbered], size: int) -> list[Prepared]:
        """The next ``size`` requests of ``source``. Raises PromptTooLongError if that is fatal."""
        return [self.prepare(index, *request) for index, request in islice(source, size)]

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Prepared:
        """The output to be filled in, and the request, or None where the output has an error."""
        output = RequestOutput(index, prompt if isinstance(prompt, str) else None, [])
        try:
            text, ids = self.setup.encode(prompt)
            output.prompt, output.prompt_token_ids = text, ids
            request = self._request(index, ids, params)
        except RequestError as error:
            if isinstance(error, PromptTooLongError) and self.on_overlong == "fail":
                raise
            output.error = error
            return output, None
        output.prompt_token_ids = request.prompt.tolist()
        return output, request

    def _request(self, index: int, ids: list[int], params: SamplingParams) -> EngineRequest:
        if not ids:
            raise InvalidRequestError(
                "The prompt is empty.", field="prompt", value="", action="Give at least one token."
            )
        limits, tokenizer = self.setup.limits, self.setup.tokenizer
        room = limits.context - min(params.max_tokens or 1, limits.context - 1)
        if self.on_overlong == "truncate-left":
            ids = ids[-room:]
        elif self.on_overlong == "truncate-right":
            ids = ids[:room]
        limits.output_tokens(len(ids), params.max_tokens)
        if params.structure is not None:
            self.grammars.check(params.structure)
        bad_words = []
        for word in params.bad_words:  # a word continues a text with or without a space before it
            for text in (word, f" {word}"):
                bad_words.append(tuple(tokenizer.encode(text, special=False)))
        seed = params.seed if params.seed is not None else row_seed(self.seed, index)
        prompt = np.array(ids, dtype=np.int32)
        return EngineRequest(index, prompt, params, seed, tuple(bad_words))


class Windows:
    """Requests in windows of ``size``, read and prepared one ahead in a thread of its own.

    A context manager. Its requests are numbered from 0, in order.
    """

    def __init__(
        self, preparer: Preparer, requests: Iterable[tuple[Prompt, SamplingParams]], size: int
    ) -> None:
        self._preparer = preparer
        self._source = enumerate(requests)
        self._size = size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quire-reader")
        self._ahead: Future[list[Prepared]] | None = self._read()

    def _read(self) -> Future[list[Prepared]]:
        return self._thread.submit(self._preparer.window, self._source, self._size)

    @property
    def more(self) -> bool:
        """Whether there is another window, which may be empty."""
        return self._ahead is not None

    @property
    def ready(self) -> bool:
        """Whether `take` returns at once."""
        return self._ahead is not None and self._ahead.done()

    def take(self) -> list[Prepared]:
        """The next window; raises what reading it raised."""
        assert self._ahead is not None
        window = self._ahead.result()
        self._ahead = self._read() if len(window) == self._size else None
        return window

    def __enter__(self) -> Windows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
