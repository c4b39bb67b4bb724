"""Which request kills its worker: suspects run apart, in ever smaller groups, down to one."""

from __future__ import annotations

from collections import Counter, deque

from quire.engine.request import EngineRequest
from quire.errors import WorkerDiedError
from quire.fleet.share import in_order

SUSPECT_DEATHS = 2  # of workers that had a request: it is suspect
ALONE_DEATHS = 3  # of workers that had it and no other: it is given up
PIECES = 8  # groups that a group is divided into


class Suspects:
    """Groups of requests to be run apart from all others, and what is known of them."""

    def __init__(self) -> None:
        self._groups: deque[list[EngineRequest]] = deque()
        self._deaths: Counter[int] = Counter()  # of workers that had the request
        self._alone: Counter[int] = Counter()  # of workers that had only it

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def next(self) -> list[EngineRequest]:
        """The next group to run."""
        return self._groups.popleft()

    def put(self, group: list[EngineRequest]) -> None:
        """Put back a group that did not run."""
        self._groups.append(group)

    def died_among(self, lost: list[EngineRequest]) -> list[EngineRequest]:
        """A worker died that had ``lost`` among others; returns those that are not suspect."""
        self._deaths.update(r.id for r in lost)
        suspects = [r for r in lost if self._deaths[r.id] >= SUSPECT_DEATHS]
        self._groups.extend(_pieces(suspects))
        return [r for r in lost if self._deaths[r.id] < SUSPECT_DEATHS]

    def died_of(self, group: list[EngineRequest], cause: str) -> WorkerDiedError | None:
        """A worker died that had only ``group`` left; returns the error of one that is given up."""
        if len(group) != 1:
            self._groups.extend(_pieces(group))
            return None
        self._alone[group[0].id] += 1
        if self._alone[group[0].id] < ALONE_DEATHS:
            self._groups.append(group)
            return None
        return WorkerDiedError(
            f"The worker that ran this row alone died, {ALONE_DEATHS} times: {cause}.",
            action="The other rows are not touched. Run the row by itself to see why.",
        )

    def forget(self, id: int) -> None:
        """The request has its answer."""
        self._deaths.pop(id, None)
        self._alone.pop(id, None)

    def clear(self) -> None:
        """Forget all."""
        self._groups.clear()
        self._deaths.clear()
        self._alone.clear()


def _pieces(requests: list[EngineRequest]) -> list[list[EngineRequest]]:
    """Up to PIECES groups of like size, neighbours in the prefix tree together."""
    ordered = in_order(requests)
    size = max(1, -(-len(ordered) // PIECES))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
