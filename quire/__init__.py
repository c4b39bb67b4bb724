"""Quire: run a language model over a large pile of prompts, every shared prefix computed once."""

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
