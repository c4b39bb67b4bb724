"""The instruction sets that run on this machine, for tests of native kernels.

Importing this module skips the importing tests where the extension was not built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from quire.kernels import native

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


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for the kernels and PyTorch, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
