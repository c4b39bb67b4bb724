"""Rows of a batch file: from one input line to a prompt with sampling parameters.

Understood are lines in the OpenAI Batch format (``custom_id``, ``url``, ``body``) and plain
objects with ``prompt``, ``messages`` or ``prompt_token_ids`` beside optional sampling fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.decode.params import PARAM_NAMES, SamplingParams
from quire.errors import InputFileError, InvalidRequestError
from quire.jobs.source import Record

Kind = Literal["completion", "chat"]
URLS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}
_PROMPTS = ("prompt", "messages", "prompt_token_ids")
_IDENTITY = {"custom_id", "id", "method", "url", "body"}
_CHAT_EXTRAS = {"tools", "documents", "chat_template_kwargs"}
_NO_EFFECT = {"user", "metadata", "store", "service_tier"}  # known, and without meaning here
_REFUSED = {  # asking for these and not getting them would be a wrong answer
    "response_format": "Structured output is not supported yet.",
    "best_of": "Use n.",
    "suffix": "Insertion is not supported.",
    "echo": "Use prompt_logprobs to score the prompt.",
    "stream": "A batch file has no streams.",
    "tool_choice": "Forced tool calls are not supported yet.",
}


@dataclass(frozen=True)
class Row:
    """One request of the input; index, file, line and name are those of its record."""

    index: int
    file: str
    line: int
    name: str
    custom_id: str
    kind: Kind
    prompt: Mapping[str, Any]
    params: SamplingParams


@dataclass(frozen=True)
class BadRow:
    """A record that cannot be run, with the reason."""

    index: int
    file: str
    line: int
    name: str
    custom_id: str | None
    error: InvalidRequestError


class RowParser:
    """Turns records into rows.

    ``defaults``: sampling parameters where a row has none. ``models``: names that a row's
    ``model`` field may have. ``template``: jinja2 over the columns of a table. ``warn`` is called
    once for each unknown field. Raises InputFileError for a template that cannot be used.
    """

    def __init__(
        self,
        defaults: SamplingParams,
        models: frozenset[str],
        warn: Callable[[str], None],
        template: str | None = None,
    ) -> None:
        self._defaults = defaults
        self._models = models
        self._warn = warn
        self._warned: set[str] = set()
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        try:
            self._template = environment.from_string(template or "")
        except TemplateError as error:
            raise InputFileError(
                f"The template cannot be used: {error}.", value=template
            ) from error

    def read(self, record: Record) -> Row | BadRow:
        """Decode and check a record. Never raises, whatever the record holds."""
        place = (record.index, record.file, record.line, record.name)
        custom_id = None
        try:
            fields = _fields(record)
            if isinstance(record.raw, dict):
                fields = self._fill(fields)
            custom_id = _custom_id(record.name, fields)
            kind, body = self._body(fields)
            return Row(*place, custom_id, kind, _prompt(kind, body), self._params(kind, body))
        except InvalidRequestError as error:
            return BadRow(*place, custom_id, error)

    def _fill(self, columns: dict[str, Any]) -> dict[str, Any]:
        try:
            prompt = self._template.render(columns)
        except (TemplateError, TypeError, ValueError) as error:
            raise _invalid(f"{error}.", "template", None) from error
        return {"prompt": prompt, "custom_id": columns.get("custom_id") or None}

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
            if body.get(name) not in (None, False, "none", {"type": "text"}) and not (
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
        expected = (
            PARAM_NAMES | _IDENTITY | set(_PROMPTS) | _CHAT_EXTRAS | _NO_EFFECT | set(_REFUSED)
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


def _custom_id(name: str, fields: dict[str, Any]) -> str:
    for key in ("custom_id", "id"):
        value = fields.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            raise _invalid(f"{key} must be a string.", key, value)
    return name


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


def _bias(value: object) -> dict[int, float]:
    """``logit_bias`` with its JSON string keys as token ids."""
    if not isinstance(value, dict):
        raise _invalid("logit_bias must be an object.", "logit_bias", value)
    try:
        return {int(k): v for k, v in value.items()}
    except ValueError as error:
        raise _invalid("logit_bias must have token ids as keys.", "logit_bias", value) from error


def _fields(record: Record) -> dict[str, Any]:
    """The record's named values. Raises InvalidRequestError."""
    raw = record.raw
    if isinstance(raw, InvalidRequestError):
        raise raw
    if isinstance(raw, dict):
        return raw
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _invalid(f"This is not UTF-8: {error}.", None, raw[:40]) from error
    except (ValueError, RecursionError) as error:
        raise _invalid(f"This is not JSON: {error}.", None, raw[:80]) from error
    if not isinstance(found, dict):
        raise _invalid("A line must hold a JSON object.", None, found)
    return found
