"""Output lines in the format of the OpenAI Batch API, in input order or as they finish."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from quire.api.outputs import CompletionOutput, RequestOutput
from quire.decode.sampling import TokenLogprobs
from quire.errors import RequestError
from quire.jobs.rows import BadRow, Row


def error_line(row: Row | BadRow, error: RequestError) -> dict[str, Any]:
    """The output line of a row that failed."""
    return {
        "id": row.name,
        "custom_id": row.custom_id,
        "response": None,
        "error": {
            "code": type(error).__name__,
            "message": str(error),
            "file": row.file,
            "line": row.line,
            "field": error.field,
        },
    }


def result_line(
    row: Row | BadRow,
    output: RequestOutput | None,
    model: str,
    token_text: Callable[[int], str],
) -> dict[str, Any]:
    """The output line of a row. ``output`` is None for a bad row."""
    if isinstance(row, BadRow):
        return error_line(row, row.error)
    assert output is not None
    if output.error is not None:
        return error_line(row, output.error)
    chat = row.kind == "chat"
    completion = sum(len(sample.token_ids) for sample in output.outputs)
    prompt = len(output.prompt_token_ids)
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{row.index}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(sample, chat, token_text) for sample in output.outputs],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": output.cached_tokens},
        },
    }
    if output.prompt_logprobs is not None:
        body["prompt_logprobs"] = [_entry(e, token_text) for e in output.prompt_logprobs]
    return {
        "id": row.name,
        "custom_id": row.custom_id,
        "response": {"status_code": 200, "request_id": row.name, "body": body},
        "error": None,
    }


def _choice(
    sample: CompletionOutput, chat: bool, token_text: Callable[[int], str]
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": sample.index, "finish_reason": sample.finish_reason}
    if chat:
        choice["message"] = {"role": "assistant", "content": sample.text}
    else:
        choice["text"] = sample.text
    entries = sample.logprobs
    if entries is None:
        choice["logprobs"] = None
    elif chat:
        choice["logprobs"] = {"content": [_entry(entry, token_text) for entry in entries]}
    else:
        choice["logprobs"] = {
            "tokens": [token_text(e.token) for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": [{token_text(t): v for t, v in e.top} for e in entries],
        }
    return choice


def _entry(entry: TokenLogprobs, token_text: Callable[[int], str]) -> dict[str, Any]:
    return {
        "token": token_text(entry.token),
        "logprob": entry.logprob,
        "top_logprobs": [{"token": token_text(t), "logprob": v} for t, v in entry.top],
    }


def to_json(line: dict[str, Any]) -> str:
    """An output line as text that any file can hold: half a surrogate pair is escaped."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(line)
    return text


class Ordered:
    """Writes lines as text; in input order, holding back those that are early, or as they come."""

    def __init__(self, write: Callable[[str], object], by_input: bool) -> None:
        self._write = write
        self._by_input = by_input
        self._next = 0
        self._early: dict[int, str] = {}

    def put(self, index: int, line: dict[str, Any]) -> None:
        """The line of input row ``index`` (from 0)."""
        text = to_json(line) + "\n"
        if not self._by_input:
            self._write(text)
            return
        self._early[index] = text
        while self._next in self._early:
            self._write(self._early.pop(self._next))
            self._next += 1

    def flush_early(self) -> None:
        """Write what is held back, for a run that ends before its input does."""
        for index in sorted(self._early):
            self._write(self._early[index])
        self._early.clear()
