from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.api.setup import model_folder
from quire.errors import CheckpointError, InvalidRequestError
from quire.models.tokenizer import Detokenizer, Tokenizer

STORIES = Path(__file__).parents[1] / "data" / "tinystories-260k"


@lru_cache
def load(name: str) -> Tokenizer:
    return Tokenizer.load(STORIES if name == "stories" else model_folder("demo"))


@pytest.mark.parametrize("name", ["stories", "demo"])
@pytest.mark.parametrize("text", ["Once upon a time", " two  spaces\n", "naïve café 🎉 日本", "x"])
def test_ids_and_text_equal_those_of_transformers(name: str, text: str) -> None:
    mine = load(name)
    folder = STORIES if name == "stories" else model_folder("demo")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert mine.encode(text) == oracle(text)["input_ids"]
    ids = mine.encode(text)
    assert mine.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert mine.encode_batch([text, "a"]) == [mine.encode(text), mine.encode("a")]


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["stories", "demo"]),
    text=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40
    ),
    cuts=st.lists(st.integers(1, 6), max_size=40),
    lost=st.integers(0, 3),
)
def test_never_half_a_character(name: str, text: str, cuts: list[int], lost: int) -> None:
    tokenizer = load(name)
    prompt = tokenizer.encode("Once upon")
    whole = tokenizer.encode("Once upon" + text)
    if whole[: len(prompt)] != prompt:
        return
    ids = whole[len(prompt) : len(whole) - lost] if lost else whole[len(prompt) :]
    detokenizer = Detokenizer(tokenizer, prompt)
    found, at = "", 0
    for cut in [*cuts, len(ids) + 1]:
        piece = detokenizer.push(ids[at : at + cut])
        assert "\ufffd" not in piece
        found += piece
        at += cut
    found += detokenizer.finish()
    assert "\ufffd" not in found
    spoken = tokenizer.decode(prompt) + found
    if lost:
        assert tokenizer.decode(whole).startswith(spoken)
    else:
        assert spoken == tokenizer.decode(whole)


def test_leading_space_of_a_continuation_is_kept() -> None:
    tokenizer = load("stories")
    prompt = tokenizer.encode("Once upon")
    ids = tokenizer.encode("Once upon a time")[len(prompt) :]
    assert tokenizer.decode(ids) == "a time"
    assert Detokenizer(tokenizer, prompt).push(ids) == " a time"


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"'\\ud83d', half of a surrogate pair"):
        load("demo").encode("a\ud83d")
    assert load("demo").encode("a\U0001f600")


def test_end_tokens_of_all_config_files(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STORIES, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Tokenizer.load(folder).eos_ids == (2, 7, 9)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_bos_is_added_where_the_config_asks(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "?": 2}, "?"))
    backend.add_special_tokens(["<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a") == [0, 1]
    assert tokenizer.encode("<s>") == [0]
    assert tokenizer.encode("a", special=False) == [1]


def test_chat_prompt_of_the_demonstration_model() -> None:
    tokenizer = load("demo")
    text = tokenizer.chat_prompt([{"role": "user", "content": "Hello"}])
    assert text == "<|user|>\nHello<|end|>\n<|assistant|>\n"
    assert tokenizer.encode_chat([{"role": "user", "content": "Hello"}])[0] == 2
    with pytest.raises(InvalidRequestError, match="no chat template"):
        load("stories").chat_prompt([{"role": "user", "content": "Hello"}])
