"""What a request may ask of the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from quire.decode.structure import Structure
from quire.errors import InvalidRequestError, shown


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Unknown or out-of-range fields are refused.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off. ``logprobs`` = k returns the
    log-probabilities of the chosen token and the k likeliest at each step, taken from the model's
    raw distribution (before penalties and temperature); ``prompt_logprobs`` the same for the
    prompt. ``max_tokens`` None means up to the model's context. With equal ``seed`` and prompt the
    output is the same, whatever else is in the batch. ``bad_words`` are strings never produced.
    ``structure`` is the form that the output must have, or a mapping that `Structure.of` takes.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = 128
    ignore_eos: bool = False
    bad_words: tuple[str, ...] = ()
    structure: Structure | None = None

    def __post_init__(self) -> None:
        _normalise(self)
        _check_types(self)
        _check_ranges(self)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken; float32 cannot divide by much less."""
        return self.temperature < 1e-5


_RANGES: dict[str, tuple[float, float]] = {
    "n": (1, 1024),
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logprobs": (0, 100),
    "prompt_logprobs": (0, 100),
    "min_tokens": (0, float("inf")),
    "max_tokens": (1, float("inf")),
}
_LARGEST_BIAS = 1e30  # leaves the largest float32 far away, whatever is added and divided
INTEGER_NAMES = frozenset(
    {"n", "top_k", "seed", "logprobs", "prompt_logprobs", "min_tokens", "max_tokens"}
)
_OPTIONAL = {"seed", "logprobs", "prompt_logprobs", "max_tokens"}


def _normalise(params: SamplingParams) -> None:
    """Accept one string for a list of strings, lists for tuples, and -1 for top-k off."""
    for name in ("stop", "bad_words", "stop_token_ids"):
        value = getattr(params, name)
        if isinstance(value, str):
            value = (value,)
        if value is None:
            value = ()
        if isinstance(value, list):
            value = tuple(value)
        object.__setattr__(params, name, value)
    if params.logit_bias is None:
        object.__setattr__(params, "logit_bias", {})
    if params.top_k == -1:
        object.__setattr__(params, "top_k", 0)
    object.__setattr__(params, "structure", Structure.of(params.structure))


def _check_types(params: SamplingParams) -> None:
    for name in _RANGES.keys() | {"seed"}:
        value = getattr(params, name)
        if value is None and name in _OPTIONAL:
            continue
        wanted: tuple[type, ...] = (int,) if name in INTEGER_NAMES else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            kind = "an integer" if name in INTEGER_NAMES else "a number"
            raise InvalidRequestError(
                f"{name} must be {kind}, not {shown(value)}.", field=name, value=value
            )
    if not isinstance(params.ignore_eos, bool):
        raise InvalidRequestError(
            f"ignore_eos must be true or false, not {shown(params.ignore_eos)}.",
            field="ignore_eos",
            value=params.ignore_eos,
        )
    for name, kind_ in (("stop", str), ("bad_words", str), ("stop_token_ids", int)):
        value = getattr(params, name)
        if not isinstance(value, tuple) or not all(
            isinstance(v, kind_) and not isinstance(v, bool) and v != "" for v in value
        ):
            what = "non-empty strings" if kind_ is str else "token ids"
            raise InvalidRequestError(
                f"{name} must be a list of {what}, not {shown(value)}.", field=name, value=value
            )
    bias = params.logit_bias
    if not isinstance(bias, Mapping) or not all(
        isinstance(k, int)
        and isinstance(v, (int, float))
        and not isinstance(v, bool)
        and abs(v) <= _LARGEST_BIAS
        for k, v in bias.items()
    ):
        raise InvalidRequestError(
            f"logit_bias must map token ids to finite numbers, not {shown(bias)}.",
            field="logit_bias",
            value=bias,
        )


def _check_ranges(params: SamplingParams) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(params, name)
        if value is not None and not low <= value <= high:
            raise InvalidRequestError(
                f"{name} is {shown(value)}, outside {low:g} to {high:g}.",
                field=name,
                value=value,
                limit=(low, high),
            )
    if params.top_p == 0:
        raise InvalidRequestError("top_p must be above 0.", field="top_p", value=0, limit=(0, 1))
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequestError(
            f"min_tokens {shown(params.min_tokens)} exceeds max_tokens {shown(params.max_tokens)}.",
            field="min_tokens",
            value=params.min_tokens,
            limit=params.max_tokens,
        )
    if params.structure is not None and params.ignore_eos:
        raise InvalidRequestError(
            "ignore_eos has no meaning with structure: a structured output ends when it is whole.",
            field="ignore_eos",
            value=True,
            action="Use min_tokens.",
        )


PARAM_NAMES = frozenset(f.name for f in fields(SamplingParams))
