"""Compiling structures, and the masks they give over real tokenizers."""

from __future__ import annotations

import shutil
import sys
import time
from functools import lru_cache
from pathlib import Path

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

pytest.importorskip("llguidance")

import gguf_files

from quire.api.setup import model_folder
from quire.decode import grammar
from quire.decode.grammar import Grammars, Matcher
from quire.decode.structure import Structure
from quire.errors import InvalidRequestError
from quire.models.tokenizer import Detokenizer, Tokenizer

STORIES = Path(__file__).parents[1] / "data" / "tinystories-260k"
NAMES = ["demo", "stories", "demo-gguf", "stories-gguf", "spaceless", "llama3-like"]


@lru_cache
def load(name: str, folder: Path) -> Tokenizer:
    """Byte-level and SentencePiece tokenizers, from folders, GGUF files and made up."""
    source = STORIES if name.startswith(("stories", "spaceless")) else model_folder("demo")
    if name in ("demo", "stories"):
        return Tokenizer.load(source)
    if name.endswith("-gguf"):
        writer = gguf.GGUFWriter(folder / f"{name}.gguf", "llama")
        gguf_files.add_tokenizer(writer, source, "smollm" if "demo" in name else None)
        return Tokenizer.load(gguf_files.finish(writer, folder / f"{name}.gguf"))
    if name == "spaceless":  # as Gemma: no space before the text, some tokens added as they are
        backend = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
        backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        backend.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("▁", " "),
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(),
            ]
        )
        backend.add_tokens([tokenizers.AddedToken("<table>", normalized=False)])
    else:
        backend = tokenizers.Tokenizer.from_file(str(model_folder("demo") / "tokenizer.json"))
        words = tokenizers.Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(words, "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.add_tokens([tokenizers.AddedToken("naïve token", normalized=False)])
    target = folder / name
    target.mkdir()
    shutil.copy(source / "tokenizer_config.json", target)
    backend.save(str(target / "tokenizer.json"))
    return Tokenizer.load(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def grammars(tokenizer: Tokenizer, vocab: int | None = None) -> Grammars:
    return Grammars(tokenizer.to_json, vocab or tokenizer.vocab_size, tokenizer.eos_ids)


def allowed(matcher: Matcher, count: int) -> set[int]:
    """The tokens that a mask holds; it must hold none from ``count`` on but the end of its own."""
    found = {
        32 * word + bit
        for word, bits in enumerate(matcher.mask.tolist())
        if bits
        for bit in range(32)
        if bits >> bit & 1
    }
    assert all(token <= count for token in found)
    return {token for token in found if token < count}


def first(found: Grammars, structure: object) -> Matcher:
    made = Structure.of(structure)
    assert made is not None
    found.check(made)
    matcher = Matcher(made)
    found.start([matcher])
    found.wait()
    return matcher


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_every_token(name: str, folder: Path) -> None:
    """The grammar reads every token as the text that it becomes."""
    tokenizer = load(name, folder)
    library = grammars(tokenizer)._tokenizer
    special = {
        token
        for token in range(tokenizer.vocab_size)
        if tokenizer.token_text(token) and not tokenizer.decode([token, token])
    }
    assert set(tokenizer.eos_ids) <= special
    context = tokenizer.encode("x=", special=False)
    whole = 0
    for token in set(range(tokenizer.vocab_size)) - special:
        text = library.decode_bytes([token])
        try:
            text.decode()
        except UnicodeDecodeError:
            continue  # part of a character: the next test sees it in company
        whole += 1
        detokenizer = Detokenizer(tokenizer, context)
        assert detokenizer.push([token]) + detokenizer.finish() == text.decode(), token
    assert whole > 0.5 * tokenizer.vocab_size
    assert all(library.is_special_token(token) for token in special)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=20))
def test_bytes_of_texts(name: str, folder: Path, text: str) -> None:
    """But for SentencePiece's sign for a space, which such tokenizers read as one."""
    tokenizer = load(name, folder)
    library = _library(name, folder)
    ids = tokenizer.encode("x=" + text, special=False)
    assert library.decode_bytes(ids).decode().removeprefix(" ") == "x=" + text


@lru_cache
def _library(name: str, folder: Path) -> object:
    return grammars(load(name, folder))._tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_masks_hold_what_can_follow(name: str, folder: Path) -> None:
    """Against all tokens of a small language, one prefix after the other."""
    tokenizer = load(name, folder)
    found = grammars(tokenizer)
    library = found._tokenizer
    choices = ["one", "on the way", "once upon a time", "two", "twenty", "é", "日本", "日本!"]
    texts = {t: library.decode_bytes([t]) for t in range(tokenizer.vocab_size)}
    texts = {t: text for t, text in texts.items() if not library.is_special_token(t)}
    goals = [choice.encode() for choice in choices]
    ended: set[bytes] = set()

    def walk(tokens: list[int]) -> None:
        matcher = first(found, {"choice": choices})
        for token in tokens:
            assert not matcher.done
            matcher.accept(token, jump=False)
            found.start([matcher])
            found.wait()
        here = b"".join(texts[t] for t in tokens)
        can_end = here in goals
        rest = [goal[len(here) :] for goal in goals if goal.startswith(here) and goal != here]
        assert matcher.done == (can_end and not rest)
        if can_end:
            ended.add(here)
        if matcher.done:
            return
        mask = allowed(matcher, tokenizer.vocab_size)
        assert {t for t in mask if t in tokenizer.eos_ids} == (
            set(tokenizer.eos_ids) if can_end else set()
        )
        viable = {t for t, text in texts.items() if text and any(r.startswith(text) for r in rest)}
        mask -= set(tokenizer.eos_ids)
        assert mask
        assert mask <= viable
        if len({r[:1] for r in rest}) > 1 or can_end:  # else only one spelling is taken
            assert mask == viable
        for token in mask:
            walk([*tokens, token])

    walk([])
    assert ended == set(goals)


def test_padding_of_the_logits_is_never_allowed(folder: Path) -> None:
    tokenizer = load("demo", folder)
    found = grammars(tokenizer, tokenizer.vocab_size + 77)
    mask = allowed(first(found, {"regex": "(?s:.*)"}), tokenizer.vocab_size + 77)
    assert max(mask) < tokenizer.vocab_size
    assert set(tokenizer.eos_ids) <= mask
    assert len(mask) > 0.9 * tokenizer.vocab_size


def test_the_mask_is_there_for_a_whole_batch(folder: Path) -> None:
    tokenizer = load("demo", folder)
    found = grammars(tokenizer)
    structures = [Structure("regex", f"[{c}]{{3}}") for c in "abcd"] * 5
    batch = [Matcher(s) for s in structures]
    found.start(batch)
    found.wait()
    for matcher in batch:
        alone = first(found, matcher.structure)
        assert (matcher.mask == alone.mask).all()
    found.start([])
    found.wait()


OPTIONS = {"anyOf": [{"properties": {f"{i}": {"type": "string"}}} for i in range(6)]}
WORDS: dict[str, object] = {f"word{i}": {} for i in range(15_000)}
CHAIN = "".join(f"r{i}: r{i + 1}\n" for i in range(9999))
REFERENCES = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(5000)}


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        ({"json_schema": {"not": {"type": "string"}}}, "not"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"type": "string", "format": "colour"}}, "colour"),
        ({"json_schema": {"$ref": "http://x.y/z"}}, "http://x.y/z"),
        ({"json_schema": {"type": "strin"}}, "strin"),
        ({"json_schema": {"allOf": [False]}}, "nsatisfiable"),
        ({"json_schema": {"$ref": "#"}}, "no output can match it"),
        ({"regex": "(a"}, "regex"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "a: /b/"}, "start"),
        ({"grammar": "start: " + "(" * 50_000}, "deeply nested"),
        ({"regex": "(" * 50_000}, "invalid regex"),
        ({"grammar": "start: A\nA: " + "~" * 50_000 + "/a/"}, "xpected value"),
        ({"json_schema": '{"items":' * 300 + "{}" + "}" * 300}, "recursion limit"),
        ({"regex": "a" * ((1 << 18) + 1)}, "more than 262,144 characters"),
        ({"json_schema": {"allOf": [OPTIONS] * 12}}, "too large"),
        ({"json_schema": {"type": "object", "properties": WORDS}}, "too big"),
        ({"regex": "|".join(map(str, range(30_000)))}, None),
        ({"choice": ["(" * 9999]}, None),
        ({"grammar": "start: r0\n" + CHAIN + "r9999: /a/"}, None),
        ({"json_schema": {"$ref": "#/$defs/0", "$defs": REFERENCES | {"5000": {}}}}, None),
        ({"json_schema": {"type": "array", "minItems": 10**9}}, None),
        ({"json_schema": {"type": "string", "minLength": 10**9}}, None),
        ({"regex": "(((a{900}b?){900}c?){900})"}, None),
        ({"regex": "([ab]*a[ab]{60}c?){20}"}, None),
        ({"json_schema": {"enum": [f"value {i}" for i in range(9999)]}}, None),
    ],
)
def test_bad_and_costly_structures(structure: object, words: str | None, folder: Path) -> None:
    """Refused with a reason (``words``), or run for a while; the process neither dies nor hangs."""
    found = grammars(load("demo", folder))
    made = Structure.of(structure)
    assert made is not None
    started = time.process_time()
    if words is None:
        matcher = first(found, made)
        for _ in range(50):
            if matcher.done or matcher.error:
                break
            matcher.accept(min(allowed(matcher, 1 << 20) - {0, 4}), jump=True)
            found.start([matcher])
            found.wait()
    else:
        with pytest.raises(InvalidRequestError, match="cannot be used: ") as caught:
            found.check(made)
        assert words in str(caught.value)
        assert caught.value.field == "response_format"
        assert len(str(caught.value)) < 600
    assert time.process_time() - started < 60  # a hang, not a speed


def test_each_structure_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    made = grammar._grammar

    def counted(structure: Structure, library: object) -> str:
        calls.append(structure)
        return made(structure, library)

    monkeypatch.setattr(grammar, "_grammar", counted)
    found = grammars(load("demo", folder))
    for _ in range(3):
        found.check(Structure("regex", "a"))
        with pytest.raises(InvalidRequestError):
            found.check(Structure("regex", "("))
    assert len(calls) == 2


def test_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequestError, match=r"pip install 'quire\[structured\]'"):
        grammars(load("demo", folder)).check(Structure("json_object"))


def test_a_tokenizer_that_it_cannot_read() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, "?"))
    found = Grammars(lambda _: (str(backend.to_str()), 1), 2, ())
    with pytest.raises(InvalidRequestError, match="cannot read this model's tokenizer"):
        found.check(Structure("json_object"))
