"""Text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from quire.errors import CheckpointError, InvalidRequestError
from quire.models.chat import render_chat
from quire.models.gguf import GGUFFile, is_gguf
from quire.models.gguf_tokenizer import tokenizer_parts

CONTEXT_TOKENS = 6  # tokens of left context with which new tokens are decoded


class Tokenizer:
    """A ``tokenizer.json`` with the special tokens and the chat template of its checkpoint."""

    def __init__(
        self,
        backend: Any,
        *,
        eos_ids: tuple[int, ...],
        bos_token: str | None,
        eos_token: str | None,
        add_bos: bool,
        chat_template: str | None,
    ) -> None:
        self._backend = backend
        self.eos_ids = eos_ids
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_id: int | None = backend.token_to_id(bos_token) if bos_token else None
        self.chat_template = chat_template
        self._add_bos = add_bos and self.bos_id is not None
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder or a GGUF file. Raises ModelError."""
        if is_gguf(folder):
            return cls(**tokenizer_parts(GGUFFile(folder)))
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json.",
                value=str(folder),
                action="Save the tokenizer in the fast format next to the weights.",
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} cannot be read: {error}.", value=str(file)) from error
        backend.no_truncation()
        backend.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        eos_token = _token_text(config.get("eos_token"))
        return cls(
            backend,
            eos_ids=_eos_ids(folder, backend, eos_token),
            bos_token=_token_text(config.get("bos_token")),
            eos_token=eos_token,
            add_bos=bool(config.get("add_bos_token")),
            chat_template=_chat_template(folder, config),
        )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``, with the tokens that the tokenizer adds if ``special``.

        Raises InvalidRequestError for half a surrogate pair, which no UTF-8 text can have.
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=special).ids
        except TypeError as error:
            half = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if half is None:
                raise
            raise InvalidRequestError(
                f"The text holds {half!r}, half of a surrogate pair.",
                field="prompt",
                value=half,
                action="Put the whole character there, or none.",
            ) from error
        return self._with_bos(ids, special)

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Many texts, on all cores."""
        found = self._backend.encode_batch(list(texts), add_special_tokens=special)
        return [self._with_bos(encoding.ids, special) for encoding in found]

    def _with_bos(self, ids: list[int], special: bool) -> list[int]:
        if special and self._add_bos and ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def chat_prompt(self, messages: object, /, **extra: Any) -> str:
        """The text of a conversation. Raises InvalidRequestError if there is no template."""
        if self.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template.",
                field="messages",
                action='Give "prompt" instead of "messages".',
            )
        return render_chat(
            self.chat_template,
            messages,
            **{"bos_token": self.bos_token or "", "eos_token": self.eos_token or "", **extra},
        )

    def encode_chat(self, messages: object, /, **extra: Any) -> list[int]:
        """Token ids of a conversation; the template itself writes the special tokens."""
        return self.encode(self.chat_prompt(messages, **extra), special=False)

    def to_json(self, extra: str) -> tuple[str, int]:
        """Its tokenizer.json with one more special token called ``extra``, and the token's id."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_special_tokens([tokenizers.AddedToken(extra, special=True)])
        token = backend.token_to_id(extra)
        assert token is not None
        return backend.to_str(), token

    def token_text(self, token: int) -> str:
        """One token as text, for reports; bytes that are no whole character show as U+FFFD."""
        return str(self._backend.decode([token], skip_special_tokens=False))


class Detokenizer:
    """Text of one sequence as its tokens come; never half a character.

    New tokens are decoded together with a few tokens before them, and the text of those is cut
    off: decoders drop a leading space, and some characters are made of several tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._start = 0  # first token of the decoding window
        self._read = len(self._ids)  # tokens whose text is out

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; the text that they complete."""
        self._ids.extend(ids)
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        now = self._tokenizer.decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """The rest, without an incomplete character at its end."""
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        now = self._tokenizer.decode(self._ids[self._start :]).rstrip("\ufffd")
        self._start = self._read = len(self._ids)
        return now[len(before) :]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``; empty if there is no such file. Raises CheckpointError."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.", value=str(file)) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object.", value=str(file))
    return found


def _token_text(token: object) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _eos_ids(folder: Path, backend: Any, eos_token: str | None) -> tuple[int, ...]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        if value is not None:
            found.update(value if isinstance(value, list) else [value])
            break
    token = backend.token_to_id(eos_token) if eos_token else None
    if token is not None:
        found.add(token)
    return tuple(sorted(found))


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
