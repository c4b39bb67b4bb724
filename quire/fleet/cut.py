"""Where to cut a row of requests between workers. Pure functions over a `Share`.

A cut inside a shared prefix makes two workers compute it. So the cost of a part depends on where it
starts, but less work never costs more: filling worker after worker up to a bound finds whether the
bound can be kept, and bisection finds the least.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quire.fleet.share import Share

SLACK = 1 / 8  # the busiest worker may do so much more than it must, to save shared prefixes
PRECISION = 1e-3  # of the least bound


def cut(share: Share, loads: Sequence[float]) -> list[range]:
    """Cut into one part, which may be empty, for each worker, which has ``loads`` to do already.

    The largest load of a worker that gets a part is at most 1 + SLACK times the least possible for
    parts in this order. Within that, each part ends where a token of duplicated prefix weighs as
    much as a token more or less than the least that would be possible from there on.
    """
    most = _least_bound(share, 0, loads) * (1 + SLACK)
    parts, start = [], 0
    for index, load in enumerate(loads):
        last = _reach(share, start, most - load)
        first = _first_end(share, start, last, loads[index + 1 :], most)
        aim = _least_bound(share, start, loads[index:])
        ends = np.arange(first, last + 1)
        costs = share.total[ends] - share.total[start] + share.shared[start] * (ends > start)
        price = share.shared[ends] + np.abs(load + costs - aim)
        end = first + int(price.argmin())
        parts.append(range(start, end))
        start = end
    return parts


def split(share: Share, keep: float, other: float) -> int:
    """The place from which on requests should go to another worker, so that the later ends soonest.

    Their worker has ``keep`` to do besides, the other one ``other``. The result is ``len(share)``
    where no move makes the end sooner by more than SLACK of the way to it.
    """
    left = keep + share.total
    right = other + share.shared + share.total[-1] - share.total
    later = np.maximum(left, right)
    place = int(later.argmin())
    return place if later[place] < (1 - SLACK) * left[-1] else len(share)


def _reach(share: Share, start: int, room: float) -> int:
    """The last place up to which requests from ``start`` cost no more than ``room``."""
    limit = room - share.shared[start] + share.total[start]
    return max(start, int(np.searchsorted(share.total, limit, side="right")) - 1)


def _fits(share: Share, start: int, loads: Sequence[float], bound: float) -> bool:
    """Whether workers with ``loads`` can do all from ``start`` on, each within ``bound``."""
    for load in loads:
        start = _reach(share, start, bound - load)
    return start == len(share)


def _least_bound(share: Share, start: int, loads: Sequence[float]) -> float:
    """The least bound that fits, and up to PRECISION more."""
    if start == len(share):
        return 0.0
    low, high = 0.0, max(loads) + share.cost(start, len(share))
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(share, start, loads, middle) else (middle, high)
    return high


def _first_end(share: Share, start: int, last: int, others: Sequence[float], bound: float) -> int:
    """The first place in [start, last] from which ``others`` can do the rest."""
    low, high = start, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(share, middle, others, bound) else (middle + 1, high)
    return low
