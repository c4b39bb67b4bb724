from __future__ import annotations

from collections.abc import Iterator

import instruction_sets
import pytest


@pytest.fixture(params=instruction_sets.NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    with instruction_sets.using(request.param) as name:
        yield name
