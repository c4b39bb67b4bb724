from __future__ import annotations

import json

import pytest

from quire.decode.params import SamplingParams
from quire.decode.structure import Structure
from quire.errors import InvalidRequestError

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
BY_SCHEMA = Structure("json_schema", json.dumps(SCHEMA))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (Structure("regex", "a"), Structure("regex", "a")),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Structure("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "strict": 1, "schema": SCHEMA}},
            BY_SCHEMA,
        ),
        ({"json_schema": SCHEMA}, BY_SCHEMA),
        ({"json": json.dumps(SCHEMA)}, BY_SCHEMA),
        ({"json": SCHEMA, "regex": None, "json_object": False}, BY_SCHEMA),
        ({"json_schema": True}, Structure("json_schema", '{"allOf": [true]}')),
        ({"json_schema": False, "regex": None}, Structure("json_schema", '{"allOf": [false]}')),
        ({"json_schema": {}}, Structure("json_schema", "{}")),
        ({"json_object": True}, Structure("json_object")),
        ({"regex": "a+"}, Structure("regex", "a+")),
        ({"choice": ["a", "é"]}, Structure("choice", '["a", "\\u00e9"]')),
        ({"choice": ("a",)}, Structure("choice", '["a"]')),
        ({"grammar": "start: /a/"}, Structure("grammar", "start: /a/")),
    ],
)
def test_forms(value: object, expected: Structure | None) -> None:
    assert Structure.of(value) == expected
    assert SamplingParams(structure=value).structure == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("json", "structure must be an object"),
        ({}, "exactly one of json_schema, .*; it has none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of .*; it has choice, regex"),
        ({"type": "xml"}, "structure has the type 'xml'. Use text, json_object"),
        ({"type": "json_schema"}, "needs a json_schema with a schema"),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, "must be a JSON object"),
        ({"json_schema": []}, "must be a JSON object"),
        ({"json_schema": "{"}, "is not JSON"),
        ({"json_schema": {"const": {1, 2}}}, "is not JSON"),
        ({"json_object": 1}, r"structure\.json_object must be true"),
        ({"regex": ""}, r"structure\.regex must be a string that is not empty"),
        ({"grammar": 1}, r"structure\.grammar must be a string"),
        ({"choice": []}, r"structure\.choice must be a list of strings that are not empty"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"choice": "abc"}, "must be a list"),
        ({"structural_tag": "x"}, "has 'structural_tag', which is not supported"),
    ],
)
def test_bad_forms(value: object, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        SamplingParams(structure=value)  # type: ignore[arg-type]
    assert caught.value.field == "structure"


def test_the_order_of_properties_tells_schemas_apart() -> None:
    other = {"type": "object", "properties": {"a": {}, "b": {}}}
    assert Structure.of({"json_schema": other}) != BY_SCHEMA
    assert len({BY_SCHEMA, Structure.of({"json_schema": SCHEMA})}) == 1


def test_an_end_that_is_ignored_is_none() -> None:
    with pytest.raises(InvalidRequestError, match="ignore_eos has no meaning with structure"):
        SamplingParams(structure=BY_SCHEMA, ignore_eos=True)
