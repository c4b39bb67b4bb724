from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run in several processes; each keeps to one core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """A trained model of 260 thousand parameters."""
    return Path(__file__).parent / "data" / "tinystories-260k"
