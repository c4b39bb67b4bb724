"""The tokenizer in a GGUF file's metadata, built anew.

Two kinds: ``gpt2``, byte-level BPE with merges and the *name* of the rule that splits text into
words, and ``llama``, SentencePiece BPE, whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from quire.errors import CheckpointError, UnsupportedModelError
from quire.models.gguf import ADVICE, GGUFFile

_KEY = "tokenizer.ggml."
_SPACE = "\u2581"  # SentencePiece's word boundary
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (  # a word ends where lower case is followed by upper case
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END_TEXTS = {  # tokens that end an answer, whatever else the metadata names
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<EOT>",
}


class _Kind(IntEnum):
    """``tokenizer.ggml.token_type``, as SentencePiece numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


@dataclass(frozen=True)
class _Words:
    """How text is split into words before BPE.

    ``pattern``: the words, or None for those of GPT-2; ``digits``: each is a word of its own;
    ``whole``: a word that is a token is not merged; ``bos``: texts start with the BOS token where
    the file is silent; ``compose``: characters are composed (NFC) first.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    compose: bool = False

    def normalizer(self) -> Any:
        return normalizers.NFC() if self.compose else None

    def pre_tokenizer(self) -> Any:
        plain = self.pattern is None
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain)]
        if self.pattern is not None:
            steps.insert(0, pre_tokenizers.Split(Regex(self.pattern), "isolated"))
        if self.digits:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        return pre_tokenizers.Sequence(steps)


def _letters_and(numbers: str) -> str:
    return _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + _REST


_GPT2 = _Words()
_DIGITS = _Words(digits=True)
_LLAMA3 = _letters_and(r"\p{N}{1,3}")
_QWEN2 = _letters_and(r"\p{N}")
_GPT4O = "|".join(f"{part}{_CONTRACTIONS}?" for part in _CASED) + r"|\p{N}{1,3}" + _CASED_REST
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _CASED_REST
WORDS: dict[str, _Words] = {  # by tokenizer.ggml.pre
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"),
        _Words(_LLAMA3, whole=True, bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _Words(_LLAMA3)),
    "qwen2": _Words(_QWEN2, compose=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "megrez"), _Words(_QWEN2)),
    **dict.fromkeys(("gpt-4o", "llama4"), _Words(_GPT4O)),
    "tekken": _Words(_TEKKEN, whole=True, bos=True),
}


def tokenizer_parts(file: GGUFFile) -> dict[str, Any]:
    """The arguments of `tokenizer.Tokenizer`. Raises ModelError."""
    metadata = file.metadata
    tokens = _strings(file, "tokens")
    kinds = metadata.get(f"{_KEY}token_type") or [_Kind.NORMAL] * len(tokens)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or len(kinds) < len(tokens):
        raise CheckpointError(
            f"{file.folder}: the list of tokens has duplicates or types are missing.",
            value=len(tokens),
            limit=min(len(vocab), len(kinds)),
            action=ADVICE,
        )
    model = metadata.get(f"{_KEY}model")
    try:
        if model == "gpt2":
            backend, add_bos = _byte_level(file, vocab)
            defaults: dict[str, int] = {}
        elif model == "llama":
            backend, add_bos = _sentence_piece(file, vocab, kinds), True
            defaults = {"bos": 1, "eos": 2}
        else:
            raise UnsupportedModelError(
                f"{file.folder}: tokenizers of the kind {model!r} are not supported.",
                value=model,
                limit=("gpt2", "llama"),
                action="Use a folder with the model's tokenizer.json.",
            )
        _add_special_tokens(file, backend, tokens, kinds)
    except (UnsupportedModelError, CheckpointError):
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{file.folder}: the tokenizer cannot be built: {error}.",
            value=str(file.folder),
            action=ADVICE,
        ) from error

    def special(name: str) -> int | None:
        found = metadata.get(f"{_KEY}{name}_token_id", defaults.get(name))
        return found if isinstance(found, int) and 0 <= found < len(tokens) else None

    bos, eos = special("bos"), special("eos")
    ends = {special(name) for name in ("eos", "eot", "eom")} - {None}
    ends |= {vocab[t] for t in END_TEXTS & vocab.keys() if kinds[vocab[t]] != _Kind.NORMAL}
    template = metadata.get("tokenizer.chat_template")
    return {
        "backend": backend,
        "eos_ids": tuple(sorted(i for i in ends if i is not None)),
        "bos_token": None if bos is None else tokens[bos],
        "eos_token": None if eos is None else tokens[eos],
        "add_bos": bool(metadata.get(f"{_KEY}add_bos_token", add_bos)),
        "chat_template": template if isinstance(template, str) else None,
    }


def _byte_level(file: GGUFFile, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether its texts start with BOS where the file is silent."""
    name = file.metadata.get(f"{_KEY}pre")
    if name not in WORDS:
        raise UnsupportedModelError(
            f"{file.folder}: the pre-tokenizer {name!r} is not supported."
            if name
            else f"{file.folder} does not name its pre-tokenizer.",
            value=name,
            limit=sorted(WORDS),
            action="Use a newer conversion of the model, or its safetensors version.",
        )
    words = WORDS[name]
    merges = []
    for line in _strings(file, "merges"):
        left, _, right = line.partition(" ")
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=words.whole))
    if words.compose:
        backend.normalizer = words.normalizer()
    backend.pre_tokenizer = words.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend, words.bos


def _sentence_piece(file: GGUFFile, vocab: dict[str, int], kinds: list[int]) -> Tokenizer:
    """BPE without words; characters that are no piece become the pieces of their bytes."""
    scores = file.metadata.get(f"{_KEY}scores")
    if not isinstance(scores, list) or len(scores) < len(vocab):
        raise CheckpointError(f"{file.folder} has no {_KEY}scores.", action=ADVICE)
    unknown = file.metadata.get(f"{_KEY}unknown_token_id", 0)
    backend = Tokenizer(
        models.BPE(
            vocab,
            _merges(vocab, scores, kinds),
            unk_token=next((t for t, i in vocab.items() if i == unknown), None),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(file.metadata.get(f"{_KEY}add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(vocab: dict[str, int], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the pieces with the best scores first."""
    found: list[tuple[float, int, str, str]] = []
    pieces = {token for token, index in vocab.items() if kinds[index] == _Kind.NORMAL}
    for piece in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[vocab[piece]], cut, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]


def _add_special_tokens(
    file: GGUFFile, backend: Tokenizer, tokens: list[str], kinds: list[int]
) -> None:
    # Phi-3's special tokens take the white space after them; its files do not say so
    takes_space = file.architecture == "phi3" and file.metadata.get(f"{_KEY}model") == "llama"
    keeps = ("<unk>", "<s>", "<|endoftext|>")
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_Kind.CONTROL, _Kind.UNKNOWN):
            rstrip = takes_space and token not in keeps
            special.append(AddedToken(token, normalized=False, special=True, rstrip=rstrip))
        elif kind == _Kind.USER_DEFINED:
            plain.append(AddedToken(token, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _strings(file: GGUFFile, name: str) -> list[str]:
    found = file.metadata.get(_KEY + name)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"{file.folder} has no {_KEY}{name}.", value=name, action=ADVICE)
    return found
