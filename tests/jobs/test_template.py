from __future__ import annotations

from pathlib import Path

import pytest

from quire.errors import InputFileError, InvalidRequestError
from quire.jobs.template import Template


def test_text_or_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("{{ a }} and {{ b }}\n")
    for template in (Template.load("{{ a }} and {{ b }}"), Template.load(str(tmp_path / "t.txt"))):
        assert template.render({"a": 1, "b": "x"}) == "1 and x"
    assert Template.load("{% if a %}yes{% endif %}").render({"a": True}) == "yes"


def test_names_that_are_no_words_and_nulls() -> None:
    assert Template('{{ row["First name"] }}').render({"First name": "Ada"}) == "Ada"
    assert Template("<{{ a }}>").render({"a": None}) == "<>"
    assert Template("{{ row }}").render({"row": "a column"}) == "a column"
    assert Template("{{ messages[0].content }}").render({"messages": [{"content": "x"}]}) == "x"


@pytest.mark.parametrize("given", ["nowhere.txt", "{{ a", "{% for %}", "{{ a | nothing }}"])
def test_unusable_templates(given: str) -> None:
    with pytest.raises(InputFileError, match="template"):
        Template.load(given)


@pytest.mark.parametrize(
    "text",
    [
        "{{ b }}",
        "{{ a.b.c }}",
        "{{ a + 1 }}",
        "{{ 1 / 0 }}",
        "{{ a | int(default=b) }}",
        "{{ a.__class__.__mro__ }}",
        "{{ row.update(b=1) }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
        "{{ a() }}",
    ],
)
def test_what_cannot_be_filled_in_is_an_error_of_the_row(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Template(text).render({"a": "x"})
    assert caught.value.field == "template"


def test_a_missing_column_is_named_beside_those_there_are() -> None:
    with pytest.raises(InvalidRequestError, match=r"'nmae' is undefined.*'name', 'place'"):
        Template("{{ nmae }}").render({"name": 1, "place": 2})
