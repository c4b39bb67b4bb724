"""What a run did, recorded in bounded memory: a timeline, histograms, shared prefixes, failures.

A job of ten million rows takes as much room here as one of a thousand. The recorder knows nothing
of the engine but its `Stats`.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from threading import Lock

from quire.api.outputs import Stats
from quire.errors import RequestError
from quire.schedule.groups import Group

BINS = 320  # of the timeline; even
GROUPS = 256  # shared prefixes that are kept when there are twice as many
CAUSES = 40  # of failures; what comes after them is counted together
EXAMPLES = 3  # of a cause
LONGEST = 400  # characters of a text that is kept
LONGEST = 400  # characters of a text that is kept
STEP_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


@dataclass(slots=True)
class Bin:
    """Steps that follow each other. ``start`` and ``end`` are seconds since the run began.

    Tokens are sums: ``prefill`` and ``decode`` computed, ``prompt`` and ``output`` delivered.
    ``kv_bytes`` and ``running`` are the largest seen after a step.
    """

    start: float
    end: float
    steps: int = 0
    prefill: int = 0
    decode: int = 0
    prompt: int = 0
    output: int = 0
    kv_bytes: int = 0
    running: int = 0

    def join(self, later: Bin) -> None:
        """Take in the bin that follows."""
        self.end = later.end
        self.steps += later.steps
        self.prefill += later.prefill
        self.decode += later.decode
        self.prompt += later.prompt
        self.output += later.output
        self.kv_bytes = max(self.kv_bytes, later.kv_bytes)
        self.running = max(self.running, later.running)


class Timeline:
    """A run as at most ``most`` (even) bins, each of equally many `add` calls but for the last.

    When there is no room for another, neighbours join in pairs.
    """

    def __init__(self, most: int = BINS) -> None:
        self.bins: list[Bin] = []
        self._most = most
        self._calls = 1  # that a full bin holds
        self._room = 0  # calls that the last bin has room for

    def add(self, new: Bin) -> None:
        """Put ``new`` at the end."""
        if self._room:
            self._room -= 1
            self.bins[-1].join(new)
            return
        if len(self.bins) == self._most:
            for first, second in zip(self.bins[::2], self.bins[1::2], strict=True):
                first.join(second)
            self.bins = self.bins[::2]
            self._calls *= 2
        self.bins.append(new)
        self._room = self._calls - 1


class Histogram:
    """Counts of whole numbers: 0 to 7 exactly, larger ones in four bins for each power of two."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()  # by number of the bin
        self.count = self.sum = self.largest = 0

    def add(self, value: int) -> None:
        """Count ``value`` (0 or more)."""
        shift = value.bit_length() - 3
        self.counts[value if shift <= 0 else 4 * shift + (value >> shift)] += 1
        self.count += 1
        self.sum += value
        if value > self.largest:
            self.largest = value

    @staticmethod
    def bounds(number: int) -> tuple[int, int]:
        """The smallest and the largest value of bin ``number``."""
        if number < 8:
            return number, number
        shift, top = number // 4 - 1, number % 4 + 4
        return top << shift, ((top + 1) << shift) - 1

    def quantile(self, share: float) -> int:
        """A value that ``share`` of the values do not exceed: the upper bound of its bin."""
        left = share * self.count
        for number in sorted(self.counts):
            left -= self.counts[number]
            if left <= 0:
                return min(self.bounds(number)[1], self.largest)
        return self.largest


@dataclass(frozen=True)
class Failure:
    """A row that failed. ``line`` counts from 1; ``code`` names the kind of error."""

    line: int
    custom_id: str | None
    code: str
    field: str | None
    message: str


@dataclass
class Cause:
    """Failures of one kind; ``examples`` are the first."""

    code: str
    field: str | None
    count: int
    examples: list[Failure]


_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


class Failures:
    """Failed rows by cause: the kind of error, the field, and the message without its values."""

    def __init__(self) -> None:
        self.count = 0
        self._causes: dict[tuple[str, str | None, str], Cause] = {}

    def add(self, failure: Failure) -> None:
        """Count a failed row."""
        self.count += 1
        key = (failure.code, failure.field, _VALUES.sub("…", failure.message[:1000]))
        if key not in self._causes and len(self._causes) >= CAUSES:
            key = ("other causes", None, "")
        cause = self._causes.setdefault(key, Cause(key[0], key[1], 0, []))
        cause.count += 1
        if len(cause.examples) < EXAMPLES:
            text, name = failure.message[:LONGEST], failure.custom_id
            name = name[:LONGEST] if name is not None else None
            cause.examples.append(replace(failure, custom_id=name, message=text))

    def causes(self) -> list[Cause]:
        """All causes, the most frequent first."""
        return sorted(self._causes.values(), key=lambda cause: -cause.count)


class SharedPrefixes:
    """The groups that save most over all windows; the same prefix of several windows is one.

    Of many small groups the smallest are forgotten, so a prefix that returns after that counts
    from anew.
    """

    def __init__(self, most: int = GROUPS) -> None:
        self._most = most
        self._known: dict[bytes, Group] = {}

    def add(self, groups: Iterable[Group]) -> None:
        """Take in the groups of a window."""
        for group in groups:
            known = self._known.get(group.key)
            if known is None:
                readers = group.readers + group.older
                self._known[group.key] = replace(group, readers=readers)
                continue
            self._known[group.key] = replace(
                known, readers=known.readers + group.readers, saved=known.saved + group.saved
            )
        if len(self._known) > 2 * self._most:
            self._known = {group.key: group for group in self.largest(self._most)}

    def largest(self, count: int) -> list[Group]:
        """The ``count`` groups that save most, largest first."""
        return nlargest(count, self._known.values(), key=lambda group: group.saved)


class StepTimes:
    """Steps by their time: ``counts[i]`` took at most ``STEP_SECONDS[i]``, the last ones longer."""

    def __init__(self) -> None:
        self.counts = [0] * (len(STEP_SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float, steps: int) -> None:
        """Count ``steps`` steps that took ``seconds`` together."""
        self.counts[bisect_left(STEP_SECONDS, seconds / steps)] += steps
        self.sum += seconds


class Recorder:
    """Records a run: `start`, then `step`, `row` and `groups` as they come.

    ``rows_before``: rows that earlier runs of the same job finished. ``rows_total`` is None while
    the input is being read. ``on_failure`` is called for every failed row.
    """

    def __init__(
        self,
        *,
        on_failure: Callable[[Failure], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.stats = Stats()
        self.rows_ok = 0
        self.rows_before = 0
        self.rows_total: int | None = None
        self.timeline = Timeline()
        self.step_times = StepTimes()
        self.prompt_lengths = Histogram()  # of rows
        self.output_lengths = Histogram()  # of samples
        self.shared = SharedPrefixes()
        self.failures = Failures()
        self._on_failure = on_failure
        self._lock = Lock()  # bad lines come from the thread that reads ahead
        self._clock = clock
        self._started = self._last = clock()

    def start(self, stats: Stats) -> None:
        """The run begins; ``stats`` is what was done before it."""
        self.stats = stats
        self._started = self._last = self._clock()

    def step(self, stats: Stats) -> None:
        """A step, or several, ended with ``stats``."""
        before, self.stats = self.stats, stats
        start, self._last = self._last, self._clock()
        steps = stats.steps - before.steps
        if steps > 0:
            self.step_times.add(stats.step_seconds - before.step_seconds, steps)
        self.timeline.add(
            Bin(
                start - self._started,
                self._last - self._started,
                steps,
                stats.computed_tokens - before.computed_tokens,
                stats.decode_tokens - before.decode_tokens,
                stats.prompt_tokens - before.prompt_tokens,
                stats.output_tokens - before.output_tokens,
                stats.kv_used_bytes,
                stats.running,
            )
        )

    def row(
        self,
        line: int,
        custom_id: str | None,
        prompt_tokens: int,
        output_tokens: Sequence[int],
        error: RequestError | None,
    ) -> None:
        """A row is finished; ``output_tokens`` holds the length of each sample."""
        if error is not None:
            self.fail(Failure(line, custom_id, type(error).__name__, error.field, str(error)))
            return
        self.rows_ok += 1
        self.prompt_lengths.add(prompt_tokens)
        for tokens in output_tokens:
            self.output_lengths.add(tokens)

    def fail(self, failure: Failure) -> None:
        """A row has failed."""
        with self._lock:
            self.failures.add(failure)
        if self._on_failure is not None:
            self._on_failure(failure)

    def groups(self, groups: Sequence[Group]) -> None:
        """A window was planned with these shared prefixes."""
        self.shared.add(groups)
