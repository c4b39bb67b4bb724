"""What only some inputs and outputs need."""

from __future__ import annotations

import importlib

from quire.errors import InputFileError


def require_pyarrow(what: str) -> None:
    """Raises InputFileError if pyarrow cannot be imported; ``what`` is said to need it."""
    try:
        importlib.import_module("pyarrow")
    except ImportError as error:
        raise InputFileError(
            f"{what} needs pyarrow, which is not installed.",
            action="Install it: pip install 'quire[arrow]'",
        ) from error
