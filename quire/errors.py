"""The errors that users see. Each says what was wrong, with which value, and what to do next.

::

    QuireError
    ├── ModelError              the checkpoint cannot be used
    │   ├── UnsupportedModelError    architecture, feature or quantisation not supported
    │   └── CheckpointError          missing, damaged or inconsistent files
    ├── MemoryBudgetError       what was asked does not fit in the memory given
    ├── RequestError            one request cannot run; the others go on
    │   ├── InvalidRequestError      a field has a wrong type or value
    │   ├── PromptTooLongError       the prompt leaves no room in the context or the KV pool
    │   └── WorkerDiedError          the worker that ran it alone died, again and again
    ├── InputFileError          the input as a whole cannot be used
    ├── JournalError            a job cannot go on: its record is damaged, in use, of other settings
    └── EngineStallError        the engine made no progress; carries a dump of its state
"""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: object) -> str:
    """A value as it looks in Python, cut to about a line: for the sentences of errors."""
    text = _SHORT.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class QuireError(Exception):
    """Base of all errors shown to users.

    ``what`` is a sentence that names the place and the fault; ``value`` the offending value,
    ``limit`` the bound that it broke (either may be None), ``action`` what to do next.
    """

    def __init__(
        self, what: str, *, value: object = None, limit: object = None, action: str = ""
    ) -> None:
        super().__init__(f"{what} {action}".strip())
        self.what = what
        self.value = value
        self.limit = limit
        self.action = action


class ModelError(QuireError):
    """The checkpoint cannot be used."""


class UnsupportedModelError(ModelError):
    """Architecture, feature or quantisation that Quire does not support."""


class CheckpointError(ModelError):
    """Missing, damaged or inconsistent checkpoint files."""


class MemoryBudgetError(QuireError):
    """What was asked does not fit in the memory given."""


class RequestError(QuireError):
    """One request cannot run; the others go on. ``field`` is the input field at fault."""

    def __init__(
        self,
        what: str,
        *,
        field: str | None = None,
        value: object = None,
        limit: object = None,
        action: str = "",
    ) -> None:
        super().__init__(what, value=value, limit=limit, action=action)
        self.field = field


class InvalidRequestError(RequestError):
    """A field has a wrong type or value."""


class PromptTooLongError(RequestError):
    """The prompt leaves no room in the model's context or in the KV pool."""


class WorkerDiedError(RequestError):
    """The worker that ran this request and nothing else died, again and again."""


class InputFileError(QuireError):
    """The input as a whole cannot be used."""


class JournalError(QuireError):
    """A job cannot go on: its record is damaged, in use, full, or of other settings or input."""


class EngineStallError(QuireError):
    """The engine made no progress; the message carries a dump of its state."""
