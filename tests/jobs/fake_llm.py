"""What `quire.jobs.run` asks of an LLM, answered at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from quire.api.outputs import CompletionOutput, RequestOutput, Stats
from quire.decode.params import SamplingParams
from quire.errors import PromptTooLongError


class FakeLLM:
    """Answers with the prompt and the seed, in a shuffled order within windows.

    Like `LLM`, it reads requests in another thread, a window ahead. ``asked`` gets each prompt
    that is computed. A prompt with "too long" in it fails.
    """

    policy = "fake"
    stats = Stats()

    def __init__(
        self,
        asked: Callable[[str], None] = lambda _: None,
        *,
        window: int = 7,
        shuffle: int | None = 0,
    ) -> None:
        self.tokenizer = self
        self._asked = asked
        self._window = window
        self._random = random.Random(shuffle) if shuffle is not None else None
        self.entered = 0

    def __enter__(self) -> FakeLLM:
        self.entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def token_text(self, token: int) -> str:
        return str(token)

    def generate_iter(
        self,
        requests: Iterable[tuple[Any, SamplingParams]],
        *,
        on_step: Callable[[Stats], None] | None = None,
        on_groups: object = None,  # noqa: ARG002
    ) -> Generator[RequestOutput, None, None]:
        source = enumerate(requests)

        def read() -> list[tuple[int, tuple[Any, SamplingParams]]]:
            return list(islice(source, self._window))

        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read)
            while window := ahead.result():
                ahead = reader.submit(read)
                if self._random is not None:
                    self._random.shuffle(window)
                for number, (prompt, params) in window:
                    yield self._answer(number, prompt["prompt"], params)
                if on_step is not None:
                    on_step(self.stats)

    def _answer(self, number: int, prompt: str, params: SamplingParams) -> RequestOutput:
        self._asked(prompt)
        output = RequestOutput(number, prompt, list(range(len(prompt))))
        if "too long" in prompt:
            output.error = PromptTooLongError("The prompt is too long.", field="prompt")
            return output
        for sample in range(params.n):
            text = f"{prompt} {params.seed} {sample} ü"
            output.outputs.append(CompletionOutput(sample, text, [1, 2], None, None, "stop"))
        return output
