"""Structures over the tokens of one model: which tokens may come next, through `llguidance`.

llguidance (github.com/guidance-ai/llguidance) is a lexer of regex derivatives below an Earley
parser; a mask is one walk of both along the trie of all tokens. It is an extra of the package, and
loaded when the first structure is compiled.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.decode.structure import Structure
from quire.errors import InvalidRequestError

# The library knows one end of outputs: a token of its own, as a model may have several or none.
_END = "<|end of structure|>"
FIELD = "response_format"  # the field at fault where a structure cannot be used
LONGEST_SOURCE = 1 << 18  # characters
COMPILED = 256  # structures that are kept compiled
_STACK = 256 << 20  # bytes: chains of references are followed by recursion
# Tighter than the library's own. A grammar of so many symbols takes seconds to compile, and most
# real schemas have a hundredth; a state is of 1 to 2 kB, shared by all outputs of a structure.
_LIMITS: dict[str, Any] = {
    "max_grammar_size": 20_000,
    "max_lexer_states": 30_000,
    "verbose_errors": False,
}
# A space may follow a comma or colon, as models write JSON in one line; no other white space, with
# which a model could go on for ever. A schema's own "x-guidance" says otherwise.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class Matcher:
    """Follows one output through its structure.

    ``done``: the output is whole and nothing may follow. ``error``: why it cannot go on, or None.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.done = False
        self.error: str | None = None
        self._state: Any = None  # llguidance.LLMatcher, from the first mask on
        self._mask: NDArray[np.int32] | None = None

    @property
    def stale(self) -> bool:
        """Whether the mask is still to be computed."""
        return self._mask is None

    @property
    def mask(self) -> NDArray[np.int32]:
        """The tokens that may come next: bits ``[words]``, lowest first."""
        assert self._mask is not None
        return self._mask

    def accept(self, token: int, *, jump: bool) -> list[int]:
        """Go on with a ``token`` that the mask holds, but for an end.

        ``jump``: also with the tokens that after it are the only ones; returns them.
        """
        self._mask = None
        state = self._state
        forced: list[int] = []
        accepted = state.consume_token(token)
        if accepted and jump and not state.is_stopped():
            forced = state.compute_ff_tokens()
            accepted = not forced or state.consume_tokens(forced)
        if not accepted or state.is_error():
            self.error = _reason(state.get_error())
        else:
            self.done = state.is_stopped()
        return forced


class Grammars:
    """Compiles structures for one model, each once, and computes masks in the background.

    ``tokenizer`` gives the text of the model's tokenizer.json with a special token of the given
    name added, and that token's id; ``vocab_size`` is the number of the model's logits; the end of
    an output is any of ``eos_ids``.
    """

    def __init__(
        self,
        tokenizer: Callable[[str], tuple[str, int]],
        vocab_size: int,
        eos_ids: tuple[int, ...],
        threads: int = 1,
    ) -> None:
        self._describe = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._threads = threads
        self._compiled = lru_cache(COMPILED)(self._compile)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="quire-masks")
        self._job: Future[None] | None = None

    @cached_property
    def _tokenizer(self) -> Any:
        """An ``LLTokenizer``, or the InvalidRequestError that says why there is none."""
        try:
            from llguidance import LLTokenizer
        except ImportError:
            return InvalidRequestError(
                "Structured output needs the package llguidance, which is not installed.",
                field=FIELD,
                action="pip install 'quire[structured]'",
            )
        text, end = self._describe(_END)
        try:
            return LLTokenizer(text, n_vocab=max(self._vocab_size, end + 1), eos_token=end)
        except BaseException as error:  # a panic of the library is no Exception
            return InvalidRequestError(
                f"Structured output cannot read this model's tokenizer: {_reason(str(error))}.",
                field=FIELD,
            )

    def check(self, structure: Structure) -> None:
        """Compile ``structure`` unless it is. Raises InvalidRequestError if it cannot be used."""
        found = self._compiled(structure)
        if isinstance(found, InvalidRequestError):
            raise found.with_traceback(None)

    def _compile(self, structure: Structure) -> Any:
        """A fresh ``LLMatcher``, or the InvalidRequestError that says why there is none."""
        tokenizer = self._tokenizer
        if isinstance(tokenizer, InvalidRequestError):
            return tokenizer
        if len(structure.source) > LONGEST_SOURCE:
            length = f"it has more than {LONGEST_SOURCE:,} characters"
            return _refused(structure, length, LONGEST_SOURCE)
        from llguidance import LLMatcher, LLParserLimits

        def build() -> Any:
            text = _grammar(structure, LLMatcher)
            limits = LLParserLimits(**_LIMITS)
            return LLMatcher(tokenizer, text, log_level=0, limits=limits)

        try:
            state = _on_deep_stack(build)
        except ValueError as error:
            return _refused(structure, str(error))
        probe = state.deep_copy()
        probe.compute_bitmask()  # finds what is well-formed and has no match
        return _refused(structure, probe.get_error()) if probe.is_error() else state

    def start(self, matchers: Sequence[Matcher]) -> None:
        """Compute the masks of ``matchers`` in the background; none may be used before `wait`."""
        self.wait()
        if matchers:
            self._job = self._worker.submit(self._fill, matchers)

    def wait(self) -> None:
        """Return when the masks that were started are there."""
        if self._job is not None:
            job, self._job = self._job, None
            job.result()

    def _fill(self, matchers: Sequence[Matcher]) -> None:
        for matcher in matchers:
            if matcher._state is None:
                matcher._state = self._compiled(matcher.structure).deep_copy()
        words = -(-self._tokenizer.vocab_size // 32)
        masks = np.empty((len(matchers), words), dtype=np.int32)
        jobs = [(matcher._state, index) for index, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(jobs, masks.ctypes.data, 4 * words, len(matchers))
        bits = masks.view(np.uint32)
        end = self._tokenizer.eos_token
        may_end = bits[:, end // 32] >> np.uint32(end % 32) & np.uint32(1)
        bits[:, end // 32] &= ~np.uint32(1 << end % 32)
        for token in self._eos_ids:
            bits[:, token // 32] |= may_end << np.uint32(token % 32)
        for index, matcher in enumerate(matchers):
            matcher._mask = masks[index]
            if matcher._state.is_error():
                matcher.error = _reason(matcher._state.get_error())

    @cached_property
    def _executor(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor(self._threads)


def _grammar(structure: Structure, library: Any) -> str:
    """The structure in llguidance's own form."""
    kind, source = structure.kind, structure.source
    if kind == "json_schema":
        return str(library.grammar_from_json_schema(source, _JSON_STYLE))
    if kind == "json_object":
        return str(library.grammar_from_json_schema('{"type": "object"}', _JSON_STYLE))
    if kind == "regex":
        return str(library.grammar_from_regex(source))
    if kind == "choice":
        options = " | ".join(json.dumps(option) for option in json.loads(source))
        return f"start: CHOICE\nCHOICE: {options}"
    return source


def _on_deep_stack(call: Callable[[], Any]) -> Any:
    """The result of ``call``, or what it raised, from a thread with `_STACK` bytes of stack."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:  # a panic of the library is no Exception
            result.set_exception(error)

    before = threading.stack_size(_STACK)
    try:
        threading.Thread(target=run, name="quire-compile").start()
    finally:
        threading.stack_size(before)
    return result.result()


def _refused(structure: Structure, reason: str, limit: object = None) -> InvalidRequestError:
    name = structure.kind.replace("_", " ").replace("json", "JSON")
    return InvalidRequestError(
        f"This {name} cannot be used: {_reason(reason)}.",
        field=FIELD,
        value=structure.source[:200],
        limit=limit,
    )


def _reason(message: str) -> str:
    """The library's message in one line, without its inner state."""
    message = message.partition("<backtrace>")[0].replace("<non-verbose/>", "")
    message = message.replace("NoExtensionBias", "no output can match it")
    return " ".join(message.split())[:300].rstrip(".")
