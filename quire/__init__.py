"""Quire: run a language model over a large pile of prompts, every shared prefix computed once."""

import os

# After each of their loops PyTorch's threads otherwise spin, for milliseconds, on the cores that
# the kernels' own threads want. OpenMP reads this when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from quire.api.llm import LLM
from quire.api.outputs import CompletionOutput, RequestOutput, Stats
from quire.decode.params import SamplingParams
from quire.decode.structure import Structure
from quire.errors import QuireError

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
