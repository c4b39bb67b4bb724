"""The instruction sets that run on this machine, for tests of native kernels.

Importing this module skips the importing tests where the extension was not built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from quire.kernels import native

Result = TypeVar("Result")

NAMES = [name for name in native.available() if name != "plain"]

if not NAMES:
    pytest.skip(
        f"the native extension is missing: {native.missing_because}", allow_module_level=True
    )


@contextmanager
def using(name: str) -> Iterator[str]:
    """The kernels called ``name``, for a while."""
    before = native.use(name)
    try:
        yield name
    finally:
        native.use(before)


def with_each(call: Callable[[], Result]) -> dict[str, Result]:
    """What ``call`` gives with each instruction set: for tests whose expectation takes long."""
    found = {}
    for name in NAMES:
        with using(name):
            found[name] = call()
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for the kernels, for a while; PyTorch keeps its one."""
    extension = native.extension()
    before = extension.threads()
    extension.set_threads(count)
    try:
        yield
    finally:
        extension.set_threads(before)
