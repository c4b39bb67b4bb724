"""The form that an output must have, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from quire.errors import InvalidRequestError, shown

Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
_ALIASES = {"json": "json_schema"}
_KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Structure:
    """What an output must be: an instance of a JSON Schema, a match of a regex, and so on.

    ``source`` is the schema as JSON text (``json_schema``), nothing (``json_object``: any object),
    a regular expression that the whole output matches (``regex``, Rust's syntax), a JSON list of
    strings (``choice``) or a grammar in Lark's syntax (``grammar``). Make one with `of`.
    """

    kind: Kind
    source: str = ""

    @classmethod
    def of(cls, value: object, field: str = "structure") -> Structure | None:
        """The structure that ``value`` asks for; None for none.

        ``value`` is a `Structure`, a mapping with one of ``json_schema`` (or ``json``),
        ``json_object``, ``regex``, ``choice`` and ``grammar``, or the ``response_format`` of the
        OpenAI API. Raises InvalidRequestError, which names ``field``. Whether a schema or a grammar
        can be used shows only when it is compiled.
        """
        if value is None or isinstance(value, Structure):
            return value
        if not isinstance(value, Mapping):
            raise _invalid(f"{field} must be an object, not {shown(value)}.", field, value)
        if "type" in value:
            return _response_format(value, field)
        named = {_ALIASES.get(str(name), str(name)): form for name, form in value.items()}
        off = (None, False)  # but false is a schema
        asked = {k: v for k, v in named.items() if v not in off or (k, v) == ("json_schema", False)}
        unknown = [name for name in asked if name not in _KINDS]
        if unknown:
            raise _invalid(
                f"{field} has {shown(unknown[0])}, which is not supported.", field, value
            )
        if len(asked) != 1:
            raise _invalid(
                f"{field} needs exactly one of {', '.join(_KINDS)}; it has "
                f"{', '.join(sorted(asked)) or 'none'}.",
                field,
                value,
            )
        return _make(*asked.popitem(), field)


def _make(kind: str, value: object, field: str) -> Structure:
    name = kind if kind == field else f"{field}.{kind}"
    if kind == "json_schema":
        return Structure("json_schema", _schema(value, field))
    if kind == "json_object":
        if value is not True:
            raise _invalid(f"{name} must be true.", field, value)
        return Structure("json_object")
    if kind == "choice":
        if isinstance(value, tuple):
            value = list(value)
        if not isinstance(value, list) or not value or not all(_text(v) for v in value):
            raise _invalid(f"{name} must be a list of strings that are not empty.", field, value)
        return Structure("choice", json.dumps(value))
    if not _text(value):
        raise _invalid(f"{name} must be a string that is not empty.", field, value)
    return Structure("regex" if kind == "regex" else "grammar", str(value))


def _text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _response_format(value: Mapping[str, object], field: str) -> Structure | None:
    """The forms of the OpenAI API. Schemas hold whatever their ``strict`` says."""
    kind = value["type"]
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure("json_object")
    if kind != "json_schema":
        raise _invalid(
            f"{field} has the type {shown(kind)}.",
            field,
            kind,
            "Use text, json_object or json_schema.",
        )
    inner = value.get("json_schema")
    if not isinstance(inner, Mapping) or "schema" not in inner:
        raise _invalid(f"{field} needs a json_schema with a schema.", field, value)
    return Structure("json_schema", _schema(inner["schema"], field))


def _schema(value: object, field: str) -> str:
    """A schema as JSON text. The order of properties is kept: outputs follow it."""
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, bool):
            value = {"allOf": [value]}  # true and false are schemas, too
        if isinstance(value, Mapping):
            return json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise _invalid(f"The schema in {field} is not JSON: {error}.", field, value) from error
    raise _invalid(f"The schema in {field} must be a JSON object.", field, value)


def _invalid(what: str, field: str, value: object, action: str = "") -> InvalidRequestError:
    return InvalidRequestError(what, field=field, value=value, action=action)
