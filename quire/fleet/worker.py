"""A worker: an `LLM` that takes commands, wherever it lives."""

from __future__ import annotations

import os
import time
from typing import Any

from quire.api.llm import LLM
from quire.engine.budget import divide_memory
from quire.engine.watchdog import EXIT_STATUS, Watchdog
from quire.fleet.messages import Advance, Ready, Report

ADVANCE_SECONDS = 0.25  # a step that has begun is finished


class Worker:
    """Runs what it is given, a moment at a time."""

    def start(self, options: dict[str, Any], together: int = 1) -> Ready:
        """Load the model with the options of `LLM`.

        ``together``: workers that divide the memory which ``options`` speak of. Raises what `LLM`
        does.
        """
        if together > 1:
            options = options | {"memory": divide_memory(options.get("memory"), together)}
        self._llm = LLM(**options)
        return Ready(self._llm.setup.budget)

    def advance(self, command: Advance) -> Report:
        """Carry out ``command``. A step that hangs ends the process (`Watchdog`)."""
        engine = self._llm.engine
        if command.fresh:
            engine.abort_all()
        wanted = set(command.withdraw)
        withdrawn = [id for id in engine.not_started() if id in wanted] if wanted else []
        engine.withdraw(withdrawn)
        if command.requests:
            engine.add(command.requests)
        results = []
        deadline = time.monotonic() + ADVANCE_SECONDS
        watchdog = Watchdog(self._llm.stall_seconds, engine.describe)
        try:
            with watchdog:
                while engine.unfinished and time.monotonic() < deadline:
                    watchdog.start()
                    results += engine.step()
                    watchdog.end()
        except KeyboardInterrupt:
            if watchdog.fired:
                os._exit(EXIT_STATUS)
            raise
        return Report(results, engine.not_started(), withdrawn, self._llm.stats)
