"""Turns a hang into a loud failure: a step that takes too long, and the state is dumped."""

from __future__ import annotations

import _thread
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

GRACE_SECONDS = 30.0  # between the interrupt and the hard exit
EXIT_STATUS = 70


class Watchdog:
    """Context manager around a loop that says `start` and `end` of every step.

    When a step lasts longer than ``seconds`` it prints ``describe()`` and all Python stacks to
    standard error and interrupts the main thread; `fired` is then true. A main thread that hangs
    in native code and does not react is ended with exit status 70.
    """

    def __init__(self, seconds: float, describe: Callable[[], str]) -> None:
        self.seconds = seconds
        self.fired = False
        self._describe = describe
        self._since = math.inf  # no step runs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="quire-watchdog", daemon=True)

    def start(self) -> None:
        """A step begins."""
        self._since = time.monotonic()

    def end(self) -> None:
        """The step is over; whoever takes the results may take his time."""
        self._since = math.inf

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._since > self.seconds:
                self.fired = True
                print(
                    f"A step has taken more than {self.seconds:g} s.\n{self._describe()}",
                    file=sys.stderr,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                _interrupt()
                if not self._stop.wait(GRACE_SECONDS):
                    os._exit(EXIT_STATUS)
                return


def _interrupt() -> None:
    """Raise KeyboardInterrupt in the main thread, out of a system call too where that is known."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()
