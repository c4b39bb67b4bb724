"""When a sequence ends."""

from __future__ import annotations

from collections.abc import Sequence

from quire.decode.params import SamplingParams


def finish_reason(
    params: SamplingParams, output: Sequence[int], eos_ids: tuple[int, ...]
) -> str | None:
    """``"stop"`` after an end-of-sequence or stop token, ``"length"`` at max_tokens, else None."""
    last = output[-1]
    if last in params.stop_token_ids or (last in eos_ids and not params.ignore_eos):
        return "stop"
    if params.max_tokens is not None and len(output) >= params.max_tokens:
        return "length"
    return None


class StopStrings:
    """Watches one sequence's text for stop strings; looks only at the tail that can matter."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._keep = max(map(len, stop), default=1) - 1
        self._tail = ""
        self._length = 0  # of all text so far

    def feed(self, text: str) -> int | None:
        """Add text; the index in the whole text at which the first stop string begins, or None."""
        window = self._tail + text
        start = self._length - len(self._tail)
        self._length += len(text)
        self._tail = window[-self._keep :] if self._keep else ""
        found = [at for at in (window.find(s) for s in self._stop) if at >= 0]
        return start + min(found) if found else None
