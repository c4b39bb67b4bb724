"""Quire: run a language model over a large pile of prompts, every shared prefix computed once."""

import os


def _load_torch() -> None:
    """Load PyTorch so that its OpenMP threads sleep while they wait.

    They otherwise spin after each of their loops, for milliseconds, on the cores that the kernels'
    own threads want. OpenMP reads the setting when it is loaded; other programs that this process
    starts are to keep theirs.
    """
    policy = "OMP_WAIT_POLICY"
    if policy in os.environ:
        return
    os.environ[policy] = "passive"
    import torch  # noqa: F401

    del os.environ[policy]


_load_torch()

from quire.api.llm import LLM  # noqa: E402
from quire.api.outputs import CompletionOutput, RequestOutput, Stats  # noqa: E402
from quire.decode.params import SamplingParams  # noqa: E402
from quire.decode.structure import Structure  # noqa: E402
from quire.errors import QuireError  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "QuireError",
    "RequestOutput",
    "SamplingParams",
    "Stats",
    "Structure",
]
