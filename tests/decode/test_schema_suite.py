"""Part of the official JSON Schema test suite: what follows a compiled schema is valid."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

from quire.api.setup import model_folder
from quire.decode.grammar import Grammars, Matcher
from quire.decode.structure import Structure
from quire.errors import InvalidRequestError
from quire.models.tokenizer import Tokenizer

SUITE = Path(__file__).parents[1] / "data" / "json-schema-test-suite"


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = Tokenizer.load(model_folder("demo"))
    return Grammars(tokenizer.to_json, tokenizer.vocab_size, tokenizer.eos_ids)


def follows(grammars: Grammars, structure: Structure, text: str) -> bool:
    """Whether a model that wants to write ``text`` can do so, token by token, and end."""
    matcher = Matcher(structure)
    end = grammars._eos_ids[0]
    for token in [*grammars._tokenizer.tokenize_str(text), end]:
        if matcher.done:
            return bool(token == end)
        grammars.start([matcher])
        grammars.wait()
        if not int(matcher.mask[token // 32]) >> token % 32 & 1:
            return False
        if token != end:
            matcher.accept(token, jump=False)
    return True


def orders(value: object) -> Iterator[object]:
    """The value, with the properties of an object in every order: schemas fix one."""
    if not isinstance(value, dict):
        return iter([value])
    return ({k: value[k] for k in names} for names in itertools.permutations(value))


def other_spelling(value: object) -> bool:
    """Whether the value holds a number that JSON Schema takes for an integer, as 1.0 for 1."""
    if isinstance(value, (list, dict)):
        return any(map(other_spelling, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value.is_integer()


@pytest.mark.parametrize("file", sorted(SUITE.glob("*.json")), ids=lambda file: file.stem)
def test_official_suite(file: Path, grammars: Grammars) -> None:
    refused = 0
    groups: list[dict[str, Any]] = json.loads(file.read_text())
    for group in groups:
        structure = Structure.of({"json_schema": group["schema"]})
        assert structure is not None
        try:
            grammars.check(structure)
        except InvalidRequestError:
            refused += 1
            continue
        for case in group["tests"]:
            texts = [json.dumps(each, ensure_ascii=False) for each in orders(case["data"])]
            found = any(follows(grammars, structure, text) for text in texts)
            if found != case["valid"]:
                # No invalid value may pass; of the valid ones, only another spelling of a number.
                assert case["valid"], (group["description"], case)
                constants = json.dumps(group["schema"])
                assert other_spelling(case["data"]) or ".0" in constants, case
    assert refused == len(groups) if file.stem == "not" else refused <= len(groups) // 2
