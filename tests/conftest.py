from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quire.kernels import native


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run in several processes; each keeps to one core."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with another instruction set than the best one are slow ones."""
    others = set(native.available()) - {"plain", native.best}
    for item in items:
        given = getattr(item, "callspec", None)
        if given is not None and not others.isdisjoint(map(str, given.params.values())):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.other_isa)


@pytest.fixture(params=native.available()[1:])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    before = native.use(request.param)
    yield request.param
    native.use(before)


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """A trained model of 260 thousand parameters."""
    return Path(__file__).parent / "data" / "tinystories-260k"
