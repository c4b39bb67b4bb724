"""Structured output on the mock model: valid whatever the plan, and nothing for other rows."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

pytest.importorskip("llguidance")

from quire.decode import grammar
from quire.decode.grammar import Grammars
from quire.decode.params import SamplingParams
from quire.decode.structure import Structure
from quire.engine.engine import Engine
from quire.engine.limits import PAGE_TOKENS
from quire.engine.request import EngineRequest, EngineResult
from quire.errors import InvalidRequestError
from quire.schedule.policies import POLICIES
from toy import BYTES, ByteTokenizer, MockModel

PAGE_BYTES = PAGE_TOKENS * 2 * 2 * 8 * 4
EOS = 0


def byte_tokenizer(extra: str) -> tuple[str, int]:
    """A tokenizer in which byte ``b`` is token ``b``, but 0 is the end; with a token more."""
    mapped = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in mapped]
    vocab = {chr(b): b for b in mapped} | {chr(256 + i): b for i, b in enumerate(others)}
    vocab = {text: b for text, b in vocab.items() if b != EOS} | {"<end>": EOS}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>", extra])
    return str(backend.to_str()), BYTES


GRAMMARS = Grammars(byte_tokenizer, BYTES, (EOS,))


def run(
    requests: list[EngineRequest],
    *,
    policy: str = "batch",
    pages: int = 4000,
    chunk: int = 512,
    grammars: Grammars = GRAMMARS,
) -> tuple[dict[int, EngineResult], Engine]:
    engine = Engine(
        MockModel(),  # type: ignore[arg-type]
        ByteTokenizer(),  # type: ignore[arg-type]
        policy=POLICIES[policy],
        kv_bytes=pages * PAGE_BYTES,
        chunk=chunk,
        eos_ids=(EOS,),
        grammars=grammars,
    )
    engine.add(requests)
    found: dict[int, EngineResult] = {}
    while engine.unfinished:
        found |= {result.id: result for result in engine.step()}
        world = engine.world
        held = [n.segment for n in world.tree.resident.values() if n.segment]
        world.pool.check(held + [s.tail for s in world.state.running])
    return found, engine


def request(
    index: int = 0, structure: object = None, prompt: str = "Answer: ", **options: Any
) -> EngineRequest:
    params = SamplingParams(
        **{"max_tokens": 60, "temperature": 1.0, "structure": structure, **options}
    )
    return EngineRequest(
        index, np.frombuffer(prompt.encode(), np.uint8).astype(np.int32), params, index
    )


def texts(result: EngineResult, reason: str = "stop") -> list[str]:
    """The samples' texts; all must have ended for ``reason``."""
    assert {s.finish_reason for s in result.samples} == {reason}
    return [s.text for s in result.samples]


def outputs(found: dict[int, EngineResult]) -> dict[int, list[tuple[list[int], str]]]:
    return {i: [(s.token_ids, s.finish_reason) for s in r.samples] for i, r in found.items()}


LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": 'é"\n'}]),
    st.tuples(st.integers(-200, 200), st.integers(0, 99)).map(
        lambda t: {"type": "integer", "minimum": t[0], "maximum": t[0] + t[1]}
    ),
    st.lists(
        st.one_of(st.text(max_size=4), st.integers(-(2**53), 2**53), st.none()),
        min_size=1,
        max_size=4,
    ).map(lambda values: {"enum": values}),
    st.integers(0, 4).map(lambda n: {"type": "string", "maxLength": n}),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-c]{1,6}$", "maxLength": 3, "minLength": 2},
            {"type": "string", "pattern": "^(ab|c)+$", "maxLength": 5},
            {"type": "string", "format": "date"},
        ]
    ),
)
SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
        ),
        st.tuples(
            st.dictionaries(st.sampled_from(["a", "key", "ü \\"]), inner, max_size=3),
            st.booleans(),
        ).map(
            lambda t: {
                "type": "object",
                "properties": t[0],
                "required": list(t[0])[:2] if t[1] else [],
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas}),
    ),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 1.0]))
def test_random_schemas_hold(schema: dict[str, Any], seed: int, temperature: float) -> None:
    structure = Structure.of({"json_schema": schema})
    assert structure is not None
    GRAMMARS.check(structure)
    asked = replace(request(0, structure, n=3, max_tokens=300, temperature=temperature), seed=seed)
    found, _ = run([asked])
    for sample in found[0].samples:
        if sample.finish_reason == "stop":
            jsonschema.validate(json.loads(sample.text), schema)
        else:
            assert len(sample.token_ids) == 300


ATOMS = st.sampled_from(["a", "bc", "[d-f]", "[^a]{2}", r"\d", "(?:xy)?"])
REGEXES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda t: t[0] + t[1]),
        st.tuples(inner, inner).map(lambda t: f"(?:{t[0]}|{t[1]})"),
        st.tuples(inner, st.integers(0, 2)).map(lambda t: f"(?:{t[0]}){{{t[1]},{t[1] + 1}}}"),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(regex=REGEXES, seed=st.integers(0, 10**6))
def test_random_regexes_hold(regex: str, seed: int) -> None:
    structure = Structure("regex", regex)
    GRAMMARS.check(structure)
    found, _ = run([replace(request(0, structure, n=4, max_tokens=200), seed=seed)])
    for text in texts(found[0]):
        assert re.fullmatch(regex, text, re.DOTALL), text


@settings(max_examples=40, deadline=None)
@given(
    choices=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1),
    seed=st.integers(0, 10**6),
)
def test_random_choices_hold(choices: list[str], seed: int) -> None:
    assume(not any("\0" in choice for choice in choices))  # the mock tokenizer has no such byte
    structure = Structure.of({"choice": choices})
    assert structure is not None
    GRAMMARS.check(structure)
    found, _ = run([replace(request(0, structure, n=4), seed=seed)])
    assert set(texts(found[0])) <= set(choices)


SUM = """
start: term (("+" | "-") term)*
term: NUMBER | "(" start ")"
NUMBER: /[0-9]{1,2}/
"""


def test_grammars_hold() -> None:
    found, _ = run([request(0, {"grammar": SUM}, n=20, max_tokens=300)])
    done = [s.text for s in found[0].samples if s.finish_reason == "stop"]
    assert len(done) > 5
    for text in done:
        assert not re.search(r"[^0-9()+-]", text)
        eval(re.sub(r"\b0+(?=\d)", "", text))


def test_any_object_holds() -> None:
    ending = {ord(char): 60.0 for char in '"}]'}
    asked = request(0, {"type": "json_object"}, n=30, max_tokens=200, logit_bias=ending)
    found, _ = run([asked])
    done = [s.text for s in found[0].samples if s.finish_reason == "stop"]
    assert done
    assert all(isinstance(json.loads(text), dict) for text in done)


PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "years_of_age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "maxItems": 3},
    },
    "required": ["first_name", "years_of_age"],
    "additionalProperties": False,
}


def mixed_requests(seed: int) -> list[EngineRequest]:
    rng = random.Random(seed)
    structures: list[object] = [
        None,
        {"json_schema": PERSON},
        {"regex": "(ab|cd){2,12}!"},
        {"choice": ["yes, certainly", "yes", "no"]},
        {"grammar": SUM},
    ]
    return [
        request(
            index,
            rng.choice(structures),
            "The same beginning. "[: rng.choice([5, 20])]
            + str(rng.randrange(3)) * rng.choice([1, 20]),
            temperature=rng.choice([0.0, 0.9]),
            n=rng.choice([1, 1, 3]),
            max_tokens=rng.choice([1, 7, 80]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            bad_words=rng.choice([(), ("b",)]),
            min_tokens=rng.choice([0, 1]),
            logprobs=rng.choice([None, None, 1]),
            stop=rng.choice([(), ("cd", "e")]),
        )
        for index in range(rng.randrange(1, 10))
    ]


def least_pages(requests: list[EngineRequest]) -> int:
    def pages(count: int) -> int:
        return -(-count // PAGE_TOKENS)

    return max(pages(len(r.prompt)) + pages(r.params.max_tokens or 0) for r in requests)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    policy=st.sampled_from(["batch", "fcfs"]),
    extra=st.sampled_from([0, 0, 3, 50]),
    chunk=st.sampled_from([1, 3, 16, 512]),
)
def test_same_tokens_whatever_the_plan(seed: int, policy: str, extra: int, chunk: int) -> None:
    """Preemption keeps the place in the structure; forced tokens come in any number of pieces."""
    requests = mixed_requests(seed)
    expected, _ = run(requests, chunk=10**6)
    pages = least_pages(requests) + extra
    found, _ = run(requests[::-1], policy=policy, pages=pages, chunk=chunk)
    assert outputs(found) == outputs(expected)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_rows_do_not_change_each_other(seed: int) -> None:
    requests = mixed_requests(seed)
    together, _ = run(requests)
    for each in requests:
        alone, _ = run([each])
        assert outputs(alone)[each.id] == outputs(together)[each.id]


def test_preemption_really_happens() -> None:
    requests = [request(i, {"json_schema": PERSON}, f"Person {i}: ") for i in range(8)]
    expected, free = run(requests)
    found, engine = run(requests, policy="fcfs", pages=14)
    assert free.world.counters.preemptions == 0
    assert engine.world.counters.preemptions > 0
    assert outputs(found) == outputs(expected)
    for result in found.values():
        for sample in result.samples:
            if sample.finish_reason == "stop":
                jsonschema.validate(json.loads(sample.text), PERSON)


def test_forced_tokens_take_no_steps() -> None:
    """The same tokens as one by one, which asking for log-probabilities brings, in fewer steps."""
    jumping, engine = run([request(0, {"json_schema": PERSON}, n=4)])
    walking, slow = run([request(0, {"json_schema": PERSON}, n=4, logprobs=0)])
    assert outputs(jumping) == outputs(walking)
    assert engine.world.steps < 0.7 * slow.world.steps
    for sample in walking[0].samples:
        assert [entry.token for entry in sample.logprobs] == sample.token_ids


def test_a_whole_output_ends_and_a_cut_one_says_so() -> None:
    forced = '{"first_name": "'
    (sample,) = run([request(0, {"json_schema": PERSON}, max_tokens=8)])[0][0].samples
    assert sample.finish_reason == "length"
    assert forced.replace(" ", "").startswith(sample.text.replace(" ", ""))
    choice = {"choice": ["maybe"]}
    assert texts(run([request(0, choice, max_tokens=5)])[0][0]) == ["maybe"]
    assert texts(run([request(0, choice, max_tokens=4)])[0][0], "length") == ["mayb"]
    assert texts(run([request(0, choice, min_tokens=9)])[0][0]) == ["maybe"]


def test_the_end_comes_only_where_the_structure_allows_it() -> None:
    """The mock model is biased to end at once, and then never to."""
    at_once = request(0, {"regex": "a{3}b*"}, logit_bias={EOS: 50.0}, n=5)
    assert texts(run([at_once])[0][0]) == ["aaa"] * 5
    never = request(0, {"regex": "a{3}b*"}, logit_bias={EOS: -1e30}, max_tokens=9)
    assert texts(run([never])[0][0], "length") == ["aaabbbbbb"]
    longer = request(0, {"regex": "a{3}b*"}, logit_bias={EOS: 50.0}, min_tokens=6)
    assert texts(run([longer])[0][0]) == ["aaabbb"]


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words": ("y", "n", "yes")},
        {"logit_bias": {ord("y"): -1e30, ord("n"): -1e30}},
        {"logit_bias": {ord("q"): 1000.0}},
        {"temperature": 0.0, "logit_bias": {ord(c): -1e30 for c in "yesno"}},
        {"top_k": 1},
        {"top_p": 0.01, "min_p": 0.9},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 50.0},
        {"min_tokens": 3},
    ],
)
def test_structure_wins_over_what_else_is_asked(options: dict[str, Any]) -> None:
    asked = replace(request(0, {"choice": ["yes", "no"]}, n=6, **options))
    masked = replace(asked, bad_words=tuple((ord(w),) for w in options.get("bad_words", ())[:2]))
    assert set(texts(run([masked])[0][0])) <= {"yes", "no"}


def test_several_ends_and_none() -> None:
    """Any end token may end an output; without one, an output ends where nothing may follow."""
    for ends in ((EOS, 200, 255), (255,)):
        grammars = Grammars(byte_tokenizer, BYTES, ends)
        engine = Engine(
            MockModel(),  # type: ignore[arg-type]
            None,
            policy=POLICIES["batch"],
            kv_bytes=99 * PAGE_BYTES,
            chunk=64,
            eos_ids=ends,
            grammars=grammars,
        )
        engine.add([request(0, {"regex": "ab*"}, logit_bias={255: 99.0}, n=2)])
        (result,) = (r for _ in range(9) for r in engine.step())
        assert [s.token_ids for s in result.samples] == [[ord("a"), 255]] * 2
    grammars = Grammars(byte_tokenizer, BYTES, ())
    found, _ = run([request(0, {"regex": "ab{2}"})], grammars=grammars)
    assert found[0].samples[0].token_ids == list(b"abb")


def test_stop_strings_cut_a_structured_text() -> None:
    asked = request(0, {"choice": ["one, two, three"]}, stop=(", th",))
    assert texts(run([asked])[0][0]) == ["one, two"]
    asked = request(0, {"choice": ["one, two, three"]}, stop_token_ids=(ord("w"),))
    assert run([asked])[0][0].samples[0].token_ids == list(b"one, tw")


def test_log_probabilities_are_of_the_raw_distribution() -> None:
    free, _ = run([request(0, None, logprobs=1, max_tokens=1, temperature=0.0)])
    bound, _ = run([request(0, {"choice": ["Q!"]}, logprobs=1, max_tokens=1)])
    (mine,), (theirs,) = bound[0].samples[0].logprobs, free[0].samples[0].logprobs
    assert mine.token == ord("Q")
    assert mine.top == theirs.top
    assert mine.rank > 1


@pytest.mark.parametrize(
    "limit",
    [{"max_lexer_states": 100}, {"step_lexer_fuel": 300}],
    ids=lambda limit: next(iter(limit)),
)
def test_a_dead_end_is_an_error_of_its_request_alone(
    limit: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A structure that outgrows the limits on the way: all its samples go, others stay."""
    monkeypatch.setattr(grammar, "_LIMITS", grammar._LIMITS | limit)
    costly = r"start: s" "\n" r"s: s s | A" "\n" r"A: /[ab]*a[ab]{30}/"
    grammars = Grammars(byte_tokenizer, BYTES, (EOS,))
    others = [request(1, {"choice": ["fine"]}), request(2, None)]
    asked = request(0, {"grammar": costly}, n=3, max_tokens=200, min_tokens=200)
    found, engine = run([asked, *others], grammars=grammars)
    error = found[0].error
    assert isinstance(error, InvalidRequestError)
    assert error.field == "response_format"
    assert "could not follow its structure" in str(error)
    assert not found[0].samples
    assert texts(found[1]) == ["fine"]
    assert found[2].samples
    assert engine.world.pool.used_pages == 0


def test_leaving_early_waits_for_masks() -> None:
    engine = Engine(
        MockModel(),  # type: ignore[arg-type]
        None,
        policy=POLICIES["batch"],
        kv_bytes=999 * PAGE_BYTES,
        chunk=4,
        eos_ids=(EOS,),
        grammars=GRAMMARS,
    )
    engine.add([request(i, {"regex": "[a-z]{50}"}) for i in range(5)])
    for _ in range(4):
        engine.step()
    engine.abort_all()
    assert engine.world.pool.used_pages == 0
    engine.add([request(9, {"choice": ["again"]})])
    (result,) = (r for _ in range(20) for r in (engine.step() if engine.unfinished else []))
    assert bytes(result.samples[0].token_ids) == b"again"
