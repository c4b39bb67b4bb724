"""Given tokens through the engine, one by one: what would the model have said at each of them?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quire.decode.params import SamplingParams
from quire.decode.sampling import Sampled
from quire.engine.engine import Engine
from quire.engine.request import EngineRequest
from quire.kv.tree import Tokens
from quire.schedule.state import Sequence as Seq


@dataclass(frozen=True)
class Span:
    """Given tokens ``[start, stop)`` that are judged.

    ``choices``: first tokens of the answers that are possible, the right one's first.
    """

    start: int
    stop: int
    choices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Script:
    """A prompt and the tokens that follow it, both int32. ``spread``: keep whole distributions."""

    prompt: Tokens
    given: Tokens
    spans: tuple[Span, ...]
    spread: bool = False


@dataclass
class Heard:
    """What the model thought of the tokens of one span.

    Of each token its log-probability, its rank from 1 and the likeliest token; ``chosen`` is the
    place in ``choices`` of the likeliest. ``spreads``: log-probabilities float32 ``[vocab]``.
    """

    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    tops: list[int] = field(default_factory=list)
    chosen: int | None = None
    spreads: list[Tensor] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether greedy decoding would have written just these tokens.

        Each is the likeliest after the right ones before it; so none but they can come out.
        """
        return all(rank == 1 for rank in self.ranks)


class Forced(Engine):
    """An engine whose sequences say what their scripts give them.

    They decode as any other sequence, so methods see what they see in earnest.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._scripts: list[Script] = []
        self._heard: list[list[Heard]] = []

    def follow(self, scripts: Sequence[Script]) -> list[list[Heard]]:
        """Run all scripts to their ends, together; what was heard in each of their spans."""
        self.begin(scripts)
        while self.unfinished:
            self.step()
        return self._heard

    def begin(self, scripts: Sequence[Script]) -> None:
        """Add scripts, in place of those before."""
        self._scripts = list(scripts)
        self._heard = [[Heard() for _ in script.spans] for script in scripts]
        self.add(
            EngineRequest(
                index,
                script.prompt,
                SamplingParams(temperature=0.0, max_tokens=len(script.given), ignore_eos=True),
                0,
            )
            for index, script in enumerate(scripts)
        )

    def choose(self, logits: Tensor, sequences: Sequence[Seq]) -> Sampled:
        """The token that each sequence is given; listens where it is judged."""
        tokens: list[int] = []
        rows: list[int] = []
        spans: list[tuple[Span, Heard, bool]] = []
        for row, seq in enumerate(sequences):
            script, at = self._scripts[seq.request], len(seq.output)
            tokens.append(int(script.given[at]))
            for span, heard in zip(script.spans, self._heard[seq.request], strict=True):
                if span.start <= at < span.stop:
                    rows.append(row)
                    spans.append((span, heard, script.spread))
        if rows:
            logprobs = logits[rows].float().log_softmax(-1)
            targets = torch.tensor([tokens[row] for row in rows], device=logits.device)
            own = logprobs.gather(1, targets[:, None])
            ranks = ((logprobs > own).sum(-1) + 1).tolist()
            found = zip(spans, logprobs, own[:, 0].tolist(), ranks, strict=True)
            for (span, heard, spread), each, logprob, rank in found:
                if not heard.ranks and span.choices:
                    heard.chosen = int(each[list(span.choices)].argmax())
                heard.logprobs.append(logprob)
                heard.ranks.append(rank)
                heard.tops.append(int(each.argmax()))
                if spread:
                    heard.spreads.append(each.cpu().clone())
        return Sampled(tokens, [None] * len(tokens))


def divergence(reference: Tensor, other: Tensor) -> float:
    """Kullback-Leibler divergence of ``other`` from ``reference``, log-probabilities, in nats."""
    shares = reference.exp()
    return float((shares * (reference - other)).sum().clamp(min=0))


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
