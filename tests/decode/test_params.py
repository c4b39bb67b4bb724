from __future__ import annotations

import pytest

from quire.decode.params import SamplingParams
from quire.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 2.0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", None),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: 10**400}),
        ("top_k", 10**30),
        ("temperature", 10**400),
        ("seed", "x"),
        ("logprobs", -1),
        ("stop", [""]),
        ("stop", 5),
        ("stop_token_ids", ["a"]),
        ("max_tokens", 0),
        ("min_tokens", 500),
        ("ignore_eos", 1),
        ("bad_words", [3]),
    ],
)
def test_bad_values_name_their_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_forms_that_users_write() -> None:
    params = SamplingParams(stop="end", top_k=-1, bad_words=["a", "b"], max_tokens=None)  # type: ignore[arg-type]
    assert params.stop == ("end",)
    assert params.top_k == 0
    assert params.bad_words == ("a", "b")
    assert SamplingParams(temperature=0).greedy


def test_a_huge_value_makes_a_short_message() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(stop=["x" * 10**6, 5])  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
