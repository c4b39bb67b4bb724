"""Options that make no sense are refused when a recipe is read, or work; nothing else."""

from __future__ import annotations

import inspect
import sys
from contextlib import suppress
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from test_engine import run, shared

from quire.errors import InvalidRequestError
from quire.kv.recipes import METHODS, parse


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_numbers_at_their_edges(name: str) -> None:
    types = get_type_hints(METHODS[name])
    requests = shared(1, 2, prefix=150, own=20)
    for option in inspect.signature(METHODS[name]).parameters:
        kinds = get_args(types[option]) or (types[option],)
        values = ("0", "-1", "3") if int in kinds else ("0.0", "-0.5", "1.5")
        for value in values if {int, float} & set(kinds) else ():
            with suppress(InvalidRequestError):
                run(requests, recipe=parse(f"{name}({option}={value})"))
