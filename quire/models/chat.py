"""Chat templates: jinja2 in a sandbox, with the helpers that published templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.errors import InvalidRequestError, shown


class _Generation(Extension):
    """``{% generation %}`` marks assistant text for training; here it only wraps its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def check_messages(messages: object) -> list[dict[str, Any]]:
    """The messages with list contents joined to text. Raises InvalidRequestError."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequestError(
            "messages must be a non-empty list.", field="messages", value=messages
        )
    checked: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(
                f"{where} must be an object with a role.", field="messages", value=message
            )
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part_text(part, where) for part in content)
        if not isinstance(content, str) and not (content is None and "tool_calls" in message):
            raise InvalidRequestError(
                f"{where}.content must be text, not {type(content).__name__}.",
                field="messages",
                value=content,
            )
        checked.append({**message, "content": content})
    return checked


def _part_text(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InvalidRequestError(
        f"{where}.content has a part of type {shown(kind)}; only text parts are supported.",
        field="messages",
        value=kind,
    )


_DEFAULTS = {
    "add_generation_prompt": True,
    "bos_token": "",
    "eos_token": "",
    "tools": None,
    "documents": None,
}


def render_chat(template: str, messages: object, /, **variables: Any) -> str:
    """The prompt text of a conversation. Raises InvalidRequestError with the template's words.

    ``variables``: what the template sees beside the messages, such as ``bos_token``, ``tools`` and
    ``add_generation_prompt`` (default True).
    """
    checked = check_messages(messages)
    try:
        return _compile(template).render({**_DEFAULTS, **variables, "messages": checked})
    except Exception as error:  # whatever a template does with odd values, only this row fails
        raise InvalidRequestError(
            f"The chat template refused the messages: {error}.", field="messages"
        ) from error
