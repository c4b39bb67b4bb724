"""What a request may need: its place in the context and in the KV pool."""

from __future__ import annotations

from dataclasses import dataclass

from quire.errors import PromptTooLongError
from quire.kernels.kv import PAGE

PAGE_TOKENS = PAGE  # a page is a tile of the kernels


@dataclass(frozen=True)
class Limits:
    """``context``: longest sequence in tokens; ``pages`` of ``page_bytes`` in the KV pool."""

    context: int
    pages: int
    page_bytes: int

    @classmethod
    def make(cls, context: int, kv_bytes: int, token_bytes: int) -> Limits:
        """The limits of a pool of ``kv_bytes`` when a token takes ``token_bytes``."""
        page_bytes = PAGE_TOKENS * token_bytes
        return cls(context, kv_bytes // page_bytes, page_bytes)

    def output_tokens(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """Output tokens that a request may have: ``max_tokens``, bounded by the context.

        Raises PromptTooLongError when the prompt fills the context, or when prompt and output
        can never fit in the KV pool together.
        """
        if prompt_tokens >= self.context:
            raise PromptTooLongError(
                f"The prompt has {prompt_tokens} tokens; the context holds {self.context} and "
                "needs room for at least one more.",
                field="prompt",
                value=prompt_tokens,
                limit=self.context,
                action="Shorten it, or use --on-overlong truncate-left or truncate-right.",
            )
        limit = min(max_tokens or self.context, self.context - prompt_tokens)
        need = -(-prompt_tokens // PAGE_TOKENS) + -(-limit // PAGE_TOKENS)
        if need > self.pages:
            raise PromptTooLongError(
                f"{prompt_tokens} prompt tokens and up to {limit} output tokens need "
                f"{need * self.page_bytes:,} bytes of KV; the pool has "
                f"{self.pages * self.page_bytes:,}.",
                field="max_tokens",
                value=need * self.page_bytes,
                limit=self.pages * self.page_bytes,
                action="Give more memory or lower max_tokens.",
            )
        return limit
