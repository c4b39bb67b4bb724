"""Rows of a batch job: from a record of the input to a prompt with sampling parameters.

Understood are records in the OpenAI Batch format (``custom_id``, ``url``, ``body``) and plain
ones with ``prompt``, ``messages`` or ``prompt_token_ids`` beside optional sampling fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal

from quire.decode.params import INTEGER_NAMES, PARAM_NAMES, SamplingParams
from quire.decode.structure import Structure
from quire.errors import InvalidRequestError, shown
from quire.jobs.records import Record, parse_json
from quire.jobs.template import Template

Kind = Literal["completion", "chat"]
URLS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}
_PROMPTS = ("prompt", "messages", "prompt_token_ids")
PROMPT_COLUMNS = frozenset({*_PROMPTS, "body"})  # a file of columns needs one without a template
_IDENTITY = {"custom_id", "id", "method", "url", "body"}
_CHAT_EXTRAS = {"tools", "documents", "chat_template_kwargs"}
_ALIASES = {"model", "max_completion_tokens", "top_logprobs"}
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
_KNOWN = frozenset().union(
    PARAM_NAMES, _IDENTITY, _PROMPTS, _CHAT_EXTRAS, _ALIASES, _NO_EFFECT, _REFUSED, _STRUCTURES,
    _STRUCTURE_KINDS,
)  # fmt: skip
_JSON_IN_COLUMNS = frozenset().union(
    PARAM_NAMES, _CHAT_EXTRAS, _ALIASES, _PROMPTS, _STRUCTURES, _STRUCTURE_KINDS, ["body"]
) - {"prompt", "model", "regex", "grammar"}
_MOST_WARNINGS = 20
_MOST_SEEN = 1000


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
    ``model`` field may have. ``warn`` is called once for each unknown field. With ``template``
    the prompt is made of the record's columns, of which only ``custom_id`` (or ``id``) has a
    meaning of its own.
    """

    def __init__(
        self,
        defaults: SamplingParams,
        models: frozenset[str],
        warn: Callable[[str], None],
        template: Template | None = None,
    ) -> None:
        self._defaults = defaults
        self._models = models
        self._warn = warn
        self._template = template
        self._warned: set[str] = set()
        self._seen: dict[str, SamplingParams] = {}  # checking them takes longer than all else

    def read(self, record: Record) -> Row | BadRow:
        """Decode and check a record. Never raises, whatever the record holds."""
        place = (record.index, record.file, record.line, record.name)
        custom_id = None
        try:
            fields = record.fields()
            if isinstance(record.raw, dict):
                fields = _without_missing(fields)
            custom_id = _custom_id(record.name, fields)
            if self._template is not None:
                prompt = _prompt("completion", {"prompt": self._template.render(fields)})
                return Row(*place, custom_id, "completion", prompt, self._defaults)
            if isinstance(record.raw, dict):
                fields = _from_columns(fields)
            kind, body = self._body(fields)
            return Row(*place, custom_id, kind, _prompt(kind, body), self._params(kind, body))
        except InvalidRequestError as error:
            return BadRow(*place, custom_id, error)

    def _body(self, fields: dict[str, Any]) -> tuple[Kind, dict[str, Any]]:
        if "url" not in fields and "body" not in fields:
            return ("chat" if "messages" in fields else "completion"), fields
        url, body = fields.get("url"), fields.get("body")
        if not isinstance(url, str) or url not in URLS:
            raise _invalid(f"url is {shown(url)}.", "url", url, f"Known are {' and '.join(URLS)}.")
        method = fields.get("method", "POST")
        if method != "POST":
            raise _invalid(f"method is {shown(method)}.", "method", method, "Use POST.")
        if not isinstance(body, dict):
            raise _invalid("body must be an object.", "body", body)
        for name in fields.keys() - _IDENTITY:
            self._unknown(name)
        return URLS[url], body

    def _params(self, kind: Kind, body: dict[str, Any]) -> SamplingParams:
        model = body.get("model")
        if model is not None and (not isinstance(model, str) or model not in self._models):
            known = ", ".join(sorted(self._models))
            raise _invalid(
                f"model is {shown(model)}; this run serves {known}.",
                "model",
                model,
                "Leave model out.",
            )
        for name, remedy in _REFUSED.items():
            if body.get(name) not in (None, False, "none") and not (
                name == "best_of" and body[name] == 1
            ):
                raise _invalid(f"{name} is not supported.", name, body[name], remedy)
        chosen = {k: v for k, v in body.items() if k in PARAM_NAMES and v is not None}
        if body.get("max_completion_tokens") is not None:
            chosen["max_tokens"] = body["max_completion_tokens"]
        if kind == "chat" and isinstance(chosen.get("logprobs"), bool):
            wanted = chosen.pop("logprobs")
            if wanted:
                top = body.get("top_logprobs")
                chosen["logprobs"] = 0 if top is None else top
        if "logit_bias" in chosen:
            chosen["logit_bias"] = _bias(chosen["logit_bias"])
        chosen |= _structure(body)
        for name in body.keys() - _KNOWN:
            self._unknown(name)
        key = repr(chosen)  # tells 1, 1.0 and true apart
        params = self._seen.get(key)
        if params is None:
            params = replace(self._defaults, **chosen)
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen[key] = params
        return params

    def _unknown(self, name: str) -> None:
        if name in self._warned or len(self._warned) > _MOST_WARNINGS:
            return
        self._warned.add(name)
        if len(self._warned) <= _MOST_WARNINGS:
            self._warn(f"The field {shown(name)} is unknown and has no effect.")
        else:
            self._warn("There are more unknown fields; they have no effect either.")


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
                "chat_template_kwargs must be an object without messages.",
                "chat_template_kwargs",
                options,
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


def _without_missing(columns: dict[str, Any]) -> dict[str, Any]:
    """The same columns with NaN, which some tools write for what is missing, as None.

    Identifiers that are whole numbers in a column with gaps are floats there: they become integers.
    """
    found = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in columns.items()
    }
    for name in ("custom_id", "id"):
        if name in found:
            found[name] = _whole(found[name]) if found[name] != "" else None
    return found


def _from_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns as the fields of a JSON line would be.

    Left out is what is null, and what is an empty text other than the prompt's. A text where JSON
    has a number, a list or an object is read as JSON; a whole float where an integer belongs
    becomes one.
    """
    found = {}
    for name, value in columns.items():
        if value is None or (value == "" and name != "prompt"):
            continue
        if name in _JSON_IN_COLUMNS:
            value = _from_text(name, value) if isinstance(value, str) else _without_nulls(value)
            if name in INTEGER_NAMES | {"max_completion_tokens", "top_logprobs"}:
                value = _whole(value)
            elif isinstance(value, Decimal):
                value = float(value)
        found[name] = value
    return found


def _from_text(name: str, text: str) -> Any:
    if name in ("stop", "bad_words") and not text.lstrip().startswith("["):
        return text
    try:
        return parse_json(text.lower() if text in ("True", "False") else text)
    except InvalidRequestError as error:
        raise _invalid(f"{name} is {shown(text)}. {error.what}", name, text) from error


def _whole(value: Any) -> Any:
    """A float or decimal without a fraction as an integer; anything else as it is."""
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _without_nulls(value: Any) -> Any:
    """Nested values without the null fields that a fixed schema has in structs; maps as dicts."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        if value and all(map(_is_pair, value)):
            return {str(k): _without_nulls(v) for k, v in value if v is not None}
        return [_without_nulls(v) for v in value]
    return value


def _is_pair(value: object) -> bool:
    """Whether this is an entry of a map, as Arrow gives it."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], (str, int))
