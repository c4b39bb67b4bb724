"""Given tokens through the engine: what would the model have said at each of them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    """A prompt and the tokens that are given after it, both int32; ``spans`` in order.

    ``spread``: keep whole distributions.
    """

    prompt: Tokens
    given: Tokens
    spans: tuple[Span, ...]
    spread: bool = False


@dataclass
class Heard:
    """What the model thought of the tokens of one span.

    Of each: the likeliest token in its place, its log-probability and its rank from 1. ``exact``:
    greedy decoding would have written just these tokens (each is the likeliest after those before
    it). ``chosen``: the place in ``choices`` of the likeliest. ``spreads``: log-probabilities
    float32 ``[vocab]``.
    """

    exact: bool = True
    chosen: int | None = None
    tops: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    spreads: list[Tensor] = field(default_factory=list)


class Forced(Engine):
    """An engine whose sequences say what their scripts give them.

    Judged tokens, and the last one before them, are decoded one by one as in earnest. What else is
    given, such as the question of a later turn, is computed in chunks like a prompt.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._scripts: list[Script] = []
        self._heard: list[list[Heard]] = []

    def follow(self, scripts: Sequence[Script]) -> list[list[Heard]]:
        """Run all scripts to their ends, together; what was heard in each of their spans."""
        heard = self.begin(scripts)
        while self.unfinished:
            self.step()
        return heard

    def begin(self, scripts: Sequence[Script]) -> list[list[Heard]]:
        """Add scripts, once those before are at their ends; returns what is yet to be filled."""
        self._scripts = list(scripts)
        self._heard = [[Heard() for _ in script.spans] for script in scripts]
        self.add(
            EngineRequest(
                index,
                script.prompt,
                SamplingParams(temperature=0.0, max_tokens=len(script.given), ignore_eos=True),
                seed=0,
            )
            for index, script in enumerate(scripts)
        )
        return self._heard

    def choose(self, logits: Tensor, sequences: Sequence[Seq]) -> Sampled:
        """The token that each sequence is given; listens where it is judged."""
        tokens: list[int] = []
        rows: list[int] = []
        judged: list[tuple[Script, Span, Heard]] = []
        for row, seq in enumerate(sequences):
            script, at = self._scripts[seq.request], len(seq.output)
            places = zip(script.spans, self._heard[seq.request], strict=True)
            span, heard = next((p for p in places if at < p[0].stop), (None, None))
            if span is not None and heard is not None and span.start <= at:
                rows.append(row)
                judged.append((script, span, heard))
            else:
                # All but the last token before the next judged one.
                until = max(at + 1, (len(script.given) if span is None else span.start) - 1)
                seq.output.extend(script.given[at : until - 1].tolist())
            tokens.append(int(script.given[len(seq.output)]))
        if rows:
            logprobs = logits[rows].log_softmax(-1)
            for (script, span, heard), row, each in zip(judged, rows, logprobs, strict=True):
                _listen(script, span, heard, tokens[row], each)
        return Sampled(tokens, [None] * len(tokens))


def _listen(script: Script, span: Span, heard: Heard, token: int, logprobs: Tensor) -> None:
    if not heard.tops and span.choices:
        heard.chosen = int(logprobs[list(span.choices)].argmax())
    top = int(logprobs.argmax())
    heard.exact = heard.exact and top == token
    heard.tops.append(top)
    heard.logprobs.append(float(logprobs[token]))
    heard.ranks.append(int((logprobs > logprobs[token]).sum()) + 1)
    if script.spread:
        heard.spreads.append(logprobs.cpu().clone())


def divergence(reference: Tensor, other: Tensor) -> float:
    """Kullback-Leibler divergence of ``other`` from ``reference``, log-probabilities; in nats."""
    return max(0.0, float((reference.exp() * (reference - other)).sum()))
