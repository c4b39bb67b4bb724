"""Templates in the well-known styles, against transformers."""

from __future__ import annotations

import pytest
import tokenizers
import transformers

from quire.errors import InvalidRequestError
from quire.models.chat import render_chat

TEMPLATES = {
    "chatml": """{% for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "inst": """{{ bos_token }}{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate.') }}
{% endif %}
{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}
{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}""",
    "headers": """{%- set ns = namespace(first=true) -%}
{%- for m in messages %}
{%- if ns.first %}{{ bos_token }}{% set ns.first = false %}{% endif -%}
<|{{ m['role'] }}|>{{ m | tojson }}
{%- if loop.index > 3 %}{% break %}{% endif %}
{%- endfor %}""",
}
TALK = [
    {"role": "user", "content": " Grüße & <b>"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And?"},
]


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("prompt", [True, False])
def test_same_text_as_transformers(name: str, length: int, prompt: bool) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, "?"))
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    expected = oracle.apply_chat_template(
        TALK[:length],
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=prompt,
    )
    found = render_chat(
        TEMPLATES[name],
        TALK[:length],
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert found == expected


def test_the_template_s_own_words_reach_the_user() -> None:
    with pytest.raises(InvalidRequestError, match="Roles must alternate"):
        render_chat(TEMPLATES["inst"], TALK[1:])


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for x in %}", "{{ 1 / 0 }}"],
)
def test_bad_templates_are_request_errors(template: str) -> None:
    with pytest.raises(InvalidRequestError, match="template"):
        render_chat(template, TALK)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": ["x"]}],
    ],
)
def test_bad_messages(messages: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render_chat(TEMPLATES["chatml"], messages)
    assert caught.value.field == "messages"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = render_chat("{{ messages[0].content }}", [{"role": "user", "content": parts}])
    assert found == "ab"
