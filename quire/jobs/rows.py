"""Rows of a batch file: from one input line to a prompt with sampling parameters.

Understood are lines in the OpenAI Batch format (``custom_id``, ``url``, ``body``) and plain
objects with ``prompt``, ``messages`` or ``prompt_token_ids`` beside optional sampling fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from quire.decode.params import PARAM_NAMES, SamplingParams
from quire.decode.structure import Structure
from quire.errors import InvalidRequestError

Kind = Literal["completion", "chat"]
URLS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}
_PROMPTS = ("prompt", "messages", "prompt_token_ids")
_IDENTITY = {"custom_id", "id", "method", "url", "body"}
_CHAT_EXTRAS = {"tools", "documents", "chat_template_kwargs"}
_NO_EFFECT = {"user", "metadata", "store", "service_tier"}  # known, and without meaning here
_REFUSED = {  # asking for these and not getting them would be a wrong answer
    "best_of": "Use n.",
    "suffix": "Insertion is not supported.",
    "echo": "Use prompt_logprobs to score the prompt.",
    "stream": "A batch file has no streams.",
    "tool_choice": "Forced tool calls are not supported yet.",
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        "Use json_schema, regex, choice or grammar.",
    ),
}
_STRUCTURES = ("structure", "response_format", "structured_outputs")  # in one of several forms
_STRUCTURE_KINDS = ("json_schema", "regex", "choice", "grammar")


@dataclass(frozen=True)
class Row:
    """One request of the input. ``line`` counts from 1."""

    line: int
    custom_id: str
    kind: Kind
    prompt: Mapping[str, Any]
    params: SamplingParams


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be run, with the reason."""

    line: int
    custom_id: str | None
    error: InvalidRequestError


class RowParser:
    """Turns lines into rows.

    ``defaults``: sampling parameters where a line has none. ``models``: names that a line's
    ``model`` field may have. ``warn`` is called once for each unknown field.
    """

    def __init__(
        self, defaults: SamplingParams, models: frozenset[str], warn: Callable[[str], None]
    ) -> None:
        self._defaults = defaults
        self._models = models
        self._warn = warn
        self._warned: set[str] = set()

    def parse(self, line: int, text: str) -> Row | BadRow:
        """Line number ``line`` (from 1) of a JSONL file."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            return BadRow(line, None, _invalid(f"This is not JSON: {error}.", None, text[:80]))
        return self.read(line, record)

    def read(self, line: int, record: object) -> Row | BadRow:
        """The same for a decoded line."""
        custom_id = None
        try:
            if not isinstance(record, dict):
                raise _invalid("A line must hold a JSON object.", None, record)
            custom_id = _custom_id(line, record)
            kind, body = self._body(record)
            prompt = _prompt(kind, body)
            return Row(line, custom_id, kind, prompt, self._params(kind, body))
        except InvalidRequestError as error:
            return BadRow(line, custom_id, error)

    def _body(self, record: dict[str, Any]) -> tuple[Kind, dict[str, Any]]:
        if "url" not in record and "body" not in record:
            return ("chat" if "messages" in record else "completion"), record
        url, body = record.get("url"), record.get("body")
        if not isinstance(url, str) or url not in URLS:
            raise _invalid(f"url is {url!r}.", "url", url, f"Supported are {' and '.join(URLS)}.")
        if record.get("method", "POST") != "POST":
            raise _invalid(
                f"method is {record['method']!r}.", "method", record["method"], "Use POST."
            )
        if not isinstance(body, dict):
            raise _invalid("body must be an object.", "body", body)
        for name in record.keys() - _IDENTITY:
            self._unknown(name)
        return URLS[url], body

    def _params(self, kind: Kind, body: dict[str, Any]) -> SamplingParams:
        model = body.get("model")
        if model is not None and (not isinstance(model, str) or model not in self._models):
            known = ", ".join(sorted(self._models))
            raise _invalid(
                f"model is {model!r}; this run serves {known}.", "model", model, "Leave model out."
            )
        for name, remedy in _REFUSED.items():
            if body.get(name) not in (None, False, "none") and not (
                name == "best_of" and body[name] == 1
            ):
                raise _invalid(f"{name} is not supported.", name, body[name], remedy)
        chosen = {k: v for k, v in body.items() if k in PARAM_NAMES and v is not None}
        if "max_completion_tokens" in body and body["max_completion_tokens"] is not None:
            chosen["max_tokens"] = body["max_completion_tokens"]
        if kind == "chat" and isinstance(chosen.get("logprobs"), bool):
            wanted = chosen.pop("logprobs")
            if wanted:
                chosen["logprobs"] = body.get("top_logprobs", 0)
        if "logit_bias" in chosen:
            chosen["logit_bias"] = _bias(chosen["logit_bias"])
        chosen |= _structure(body)
        expected = (
            PARAM_NAMES
            | _IDENTITY
            | {*_PROMPTS, *_STRUCTURES, *_STRUCTURE_KINDS}
            | _CHAT_EXTRAS
            | _NO_EFFECT
            | set(_REFUSED)
        )
        for name in body.keys() - expected - {"model", "max_completion_tokens", "top_logprobs"}:
            self._unknown(name)
        return replace(self._defaults, **chosen)

    def _unknown(self, name: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            self._warn(f"The field {name!r} is unknown and has no effect.")


def _invalid(what: str, field: str | None, value: object, action: str = "") -> InvalidRequestError:
    return InvalidRequestError(what, field=field, value=value, action=action)


def _custom_id(line: int, record: dict[str, Any]) -> str:
    for name in ("custom_id", "id"):
        value = record.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            raise _invalid(f"{name} must be a string.", name, value)
    return f"line-{line}"


def _prompt(kind: Kind, body: dict[str, Any]) -> Mapping[str, Any]:
    """The one prompt of the body, in the form that `LLM.generate` takes."""
    given = [name for name in _PROMPTS if body.get(name) is not None]
    if kind == "chat" and given != ["messages"]:
        raise _invalid("A chat line needs messages and no other prompt.", "messages", given)
    if len(given) != 1:
        raise _invalid(
            f"A line needs exactly one of {', '.join(_PROMPTS)}; it has {given or 'none'}.",
            "prompt",
            given,
        )
    name = given[0]
    value = body[name]
    if name == "messages":
        extras = {k: body[k] for k in ("tools", "documents") if k in body}
        options = body.get("chat_template_kwargs", {})
        if not isinstance(options, dict) or "messages" in options:
            raise _invalid(
                "chat_template_kwargs must be an object.", "chat_template_kwargs", options
            )
        return {"messages": value, **extras, **options}
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, list) and all(type(v) is int for v in value) and value:
        return {"prompt_token_ids": value}
    if name == "prompt" and isinstance(value, str) and value:
        return {"prompt": value}
    if value in ("", []):
        raise _invalid("The prompt is empty.", name, value, "Give at least one token.")
    wanted = "a string or a list of token ids" if name == "prompt" else "a list of token ids"
    raise _invalid(f"{name} must be {wanted}.", name, value, "Write one line for each prompt.")


def _structure(body: dict[str, Any]) -> dict[str, Structure | None]:
    """The one structure that a body asks for; None where it asks for text; empty for no word."""
    given = [name for name in (*_STRUCTURES, *_STRUCTURE_KINDS) if body.get(name) is not None]
    if not given:
        return {}
    if len(given) > 1:
        raise _invalid(f"A line has {' and '.join(given)}.", given[1], given, "Give one of them.")
    name = given[0]
    value = body[name] if name in _STRUCTURES else {name: body[name]}
    return {"structure": Structure.of(value, name)}


def _bias(value: object) -> dict[int, float]:
    """``logit_bias`` with its JSON string keys as token ids."""
    if not isinstance(value, dict):
        raise _invalid("logit_bias must be an object.", "logit_bias", value)
    try:
        return {int(k): v for k, v in value.items()}
    except ValueError as error:
        raise _invalid("logit_bias must have token ids as keys.", "logit_bias", value) from error
