"""Prompts made from columns: ``--template``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.errors import InputFileError, InvalidRequestError, shown


class Template:
    """A jinja2 template over the named values of a record.

    A name that the record lacks is an error; a null is an empty text. ``row`` is all columns by
    name, for names such as ``row["First name"]``.
    """

    def __init__(self, text: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined,
            finalize=lambda value: "" if value is None else value,
        )
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise InputFileError(
                f"The template cannot be used: {error}.",
                value=text,
                action="It is jinja2: {{ column }} stands for a column.",
            ) from error

    @classmethod
    def load(cls, given: str) -> Template:
        """``given`` is the text itself if it has ``{{`` or ``{%``, else the name of a file.

        Raises InputFileError.
        """
        return cls(read_template(given))

    def render(self, columns: Mapping[str, Any]) -> str:
        """The prompt of a record. Raises InvalidRequestError."""
        try:
            return self._template.render({"row": columns, **columns})
        except jinja2.UndefinedError as error:
            known = ", ".join(map(shown, list(columns)[:20]))
            raise InvalidRequestError(
                f"The template cannot be filled in: {error.message}. The row has {known}.",
                field="template",
            ) from error
        except (
            Exception
        ) as error:  # whatever the template does with odd values, only this row fails
            raise InvalidRequestError(
                f"The template cannot be filled in: {error}.", field="template"
            ) from error


def read_template(given: str) -> str:
    """The template's text: ``given`` itself if it has ``{{`` or ``{%``, else that file's.

    Raises InputFileError.
    """
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputFileError(
            f"The template {given} cannot be read: {error}.",
            value=given,
            action='Give a file, or a text with a column in it such as "{{ question }}".',
        ) from error
