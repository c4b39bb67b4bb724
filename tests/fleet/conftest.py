from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from quire.bench.shapes import make_checkpoint
from quire.kernels import native

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "kv_memory": "16MiB",
    "chunk": 64,
    "context": 512,
    "seed": 3,
    "deterministic": native.active() != "plain",  # equal to the last bit
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, of sizes that the kernels take, and a tokenizer."""
    folder = make_checkpoint("tiny", tmp_path_factory.mktemp("shapes"))
    tokenizer = Path(__file__).parents[1] / "data/tinystories-260k/tokenizer.json"
    shutil.copy(tokenizer, folder)
    return folder
