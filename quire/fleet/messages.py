"""What the coordinator and its workers say to each other, and what carries it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from quire.api.outputs import Stats
from quire.engine.budget import Budget
from quire.engine.request import EngineRequest, EngineResult
from quire.errors import QuireError


@dataclass(frozen=True)
class Start:
    """Start the worker, or start it again. The answer is `Ready` or `Died`."""


@dataclass(frozen=True)
class Advance:
    """Run for a moment; the answer is `Report` or `Died`.

    First drop everything (``fresh``) or give back those requests of ``withdraw`` that have not
    started, then take ``requests`` as one planning window.
    """

    requests: list[EngineRequest] = field(default_factory=list)
    withdraw: list[int] = field(default_factory=list)
    fresh: bool = False


@dataclass(frozen=True)
class Ready:
    """The worker has loaded its model and has ``budget`` bytes."""

    budget: Budget


@dataclass(frozen=True)
class Report:
    """What an `Advance` came to.

    ``results``: finished requests; ``waiting``: ids of those not started, next to start first;
    ``withdrawn``: ids of those given back; ``stats``: since the worker's start.
    """

    results: list[EngineResult]
    waiting: list[int]
    withdrawn: list[int]
    stats: Stats


@dataclass(frozen=True)
class Died:
    """The worker is gone. ``error``: what it raised, where it lived long enough to say so."""

    cause: str
    error: QuireError | None = None

    @classmethod
    def of(cls, error: BaseException) -> Died:
        """Death by an exception."""
        known = error if isinstance(error, QuireError) else None
        return cls(f"{type(error).__name__}: {error}", known)


Command = Start | Advance
Message = Ready | Report | Died


class Transport(Protocol):
    """Carries commands to workers, which have numbers from 0, and their messages back.

    A worker has one command at a time; it may die at any time, also without one.
    """

    def send(self, worker: int, command: Command) -> None:
        """Hand ``command`` over, without waiting for its answer."""
        ...

    def wait(self, seconds: float) -> list[tuple[int, Message]]:
        """Messages, as soon as there is one; none if nothing came within ``seconds``."""
        ...

    def close(self) -> None:
        """End all workers at once."""
        ...
