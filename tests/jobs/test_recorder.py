"""Whatever a run does, the record adds up, and it stays small."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.api.outputs import Stats
from quire.errors import InvalidRequestError
from quire.jobs.recorder import (
    CAUSES,
    EXAMPLES,
    LONGEST,
    STEP_SECONDS,
    Bin,
    Failure,
    Failures,
    Histogram,
    Recorder,
    SharedPrefixes,
    StepTimes,
    Timeline,
)
from quire.schedule.groups import Group

SUMS = ("steps", "prefill", "decode", "prompt", "output")
PEAKS = ("kv_bytes", "running")
COUNT = st.integers(0, 10**6)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.floats(0, 5), *[COUNT] * 7), max_size=200),
    most=st.sampled_from([2, 8, 64]),
)
def test_bins_add_up(steps: list[tuple[float, ...]], most: int) -> None:
    timeline, now = Timeline(most), 0.0
    for seconds, *values in steps:
        timeline.add(Bin(now, now + seconds, *values))  # type: ignore[arg-type]
        now += seconds
    bins = timeline.bins
    assert len(bins) <= most
    assert not steps or len(bins) > most // 2 or len(bins) == len(steps)
    names = [f.name for f in fields(Bin)][2:]
    assert set(names) == {*SUMS, *PEAKS}
    for place, name in enumerate(names, start=1):
        given_values = [step[place] for step in steps]
        found = [getattr(b, name) for b in bins]
        if name in SUMS:
            assert sum(found) == sum(given_values)
        else:
            assert max(found, default=0) == max(given_values, default=0)
    assert all(a.end == b.start for a, b in pairwise(bins))
    assert not bins or (bins[0].start == 0.0 and bins[-1].end == now)


@given(values=st.lists(st.integers(0, 2**40), max_size=50), share=st.floats(0.01, 1.0))
def test_histogram(values: list[int], share: float) -> None:
    data = Histogram()
    for value in values:
        before = dict(data.counts)
        data.add(value)
        (number,) = [n for n, count in data.counts.items() if before.get(n, 0) != count]
        low, high = Histogram.bounds(number)
        assert low <= value <= high
        assert high - low <= low / 4
    assert (data.count, data.sum) == (len(values), sum(values))
    assert sum(data.counts.values()) == data.count
    assert data.largest == max(values, default=0)
    if values:
        bound = data.quantile(share)
        assert sum(v <= bound for v in values) >= share * len(values)
        assert data.quantile(1.0) == max(values)


def test_histogram_bins_touch() -> None:
    edges = [Histogram.bounds(number) for number in range(200)]
    assert edges[0] == (0, 0)
    assert all(high + 1 == low for (_, high), (low, _) in pairwise(edges))


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 9)), max_size=30))
def test_step_times(steps: list[tuple[float, int]]) -> None:
    times = StepTimes()
    for seconds, count in steps:
        times.add(seconds, count)
    assert sum(times.counts) == sum(count for _, count in steps)
    for place, bound in enumerate(STEP_SECONDS, start=1):
        expected = sum(count for seconds, count in steps if seconds / count <= bound)
        assert sum(times.counts[:place]) == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data(), calls=st.integers(0, 40))
def test_recorder_takes_differences(data: st.DataObject, calls: int) -> None:
    """Totals of a run are those of the stats since its start, however often steps are reported."""
    now = 100.0
    recorder = Recorder(clock=lambda: now)
    start = Stats(steps=7, computed_tokens=50, output_tokens=3, step_seconds=1.0)
    stats = start
    recorder.start(start)
    for _ in range(calls):
        now += data.draw(st.floats(0, 2))
        stats = replace(
            stats,
            steps=stats.steps + data.draw(st.integers(0, 3)),
            computed_tokens=stats.computed_tokens + data.draw(COUNT),
            decode_tokens=stats.decode_tokens + data.draw(COUNT),
            prompt_tokens=stats.prompt_tokens + data.draw(COUNT),
            output_tokens=stats.output_tokens + data.draw(COUNT),
            kv_used_bytes=data.draw(COUNT),
        )
        recorder.step(stats)
    bins = recorder.timeline.bins
    assert recorder.stats == stats
    assert sum(b.steps for b in bins) == stats.steps - 7
    assert sum(b.steps for b in bins) == sum(recorder.step_times.counts)
    assert sum(b.prefill for b in bins) == stats.computed_tokens - 50
    assert sum(b.decode for b in bins) == stats.decode_tokens
    assert sum(b.prompt for b in bins) == stats.prompt_tokens
    assert sum(b.output for b in bins) == stats.output_tokens - 3
    assert not bins or bins[-1].end == pytest.approx(now - 100.0)


def test_rows_are_counted_and_failures_told() -> None:
    told: list[Failure] = []
    recorder = Recorder(on_failure=told.append)
    recorder.row(1, "a", 10, [3, 4], None)
    error = InvalidRequestError("Bad.", field="prompt", action="Mend it.")
    recorder.row(2, None, 0, (), error)
    assert (recorder.rows_ok, recorder.failures.count) == (1, 1)
    assert (recorder.prompt_lengths.count, recorder.output_lengths.count) == (1, 2)
    assert recorder.output_lengths.sum == 7
    assert told == [Failure(2, None, "InvalidRequestError", "prompt", "Bad. Mend it.")]


def failure(line: int, message: str, code: str = "InvalidRequestError") -> Failure:
    return Failure(line, f"row-{line}", code, "prompt", message)


def test_one_cause_whatever_the_values() -> None:
    failures = Failures()
    for line in range(1, 21):
        failures.add(failure(line, f"The prompt has {line * 1234:,} tokens; '{line}' is too many."))
    failures.add(failure(21, "The prompt is empty."))
    first, second = failures.causes()
    assert (first.count, second.count, failures.count) == (20, 1, 21)
    assert [e.line for e in first.examples] == list(range(1, EXAMPLES + 1))


def test_failures_stay_small() -> None:
    failures = Failures()
    for line in range(3000):
        name = "".join(chr(97 + int(digit)) for digit in str(line))
        failures.add(failure(line, f"{name} {'x' * 10_000}"))
    causes = failures.causes()
    assert len(causes) == CAUSES + 1
    assert sum(cause.count for cause in causes) == failures.count == 3000
    assert all(len(e.message) <= LONGEST for cause in causes for e in cause.examples)
    assert all(len(cause.examples) <= EXAMPLES for cause in causes)


def group(name: int, saved: int, readers: int = 2, older: int = 0) -> Group:
    return Group(name.to_bytes(4, "big"), 0, 8, (1, 2), readers, older, saved)


@settings(max_examples=60, deadline=None)
@given(
    windows=st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)))),
)
def test_the_same_prefix_of_several_windows_is_one(windows: list[list[tuple[int, int]]]) -> None:
    shared = SharedPrefixes(most=10)
    totals: dict[int, int] = {}
    for window in windows:
        shared.add(group(name, saved) for name, saved in window)
        for name, saved in window:
            totals[name] = totals.get(name, 0) + saved
    found = {int.from_bytes(g.key, "big"): g.saved for g in shared.largest(100)}
    assert found == totals


def test_prefixes_stay_few_and_the_largest_stay() -> None:
    shared = SharedPrefixes(most=8)
    for window in range(100):
        shared.add([group(0, 1000, 5, 1), *(group(1 + window * 9 + i, i) for i in range(1, 9))])
        assert len(shared.largest(1000)) <= 16
    first = shared.largest(1)[0]
    assert (first.saved, first.readers) == (100_000, 501)


def test_a_long_job_takes_no_more_room() -> None:
    def record(rows: int) -> Recorder:
        now = 0.0
        recorder = Recorder(clock=lambda: now)
        for i in range(rows):
            now += 0.01
            recorder.step(Stats(steps=i + 1, prompt_tokens=100 * i, kv_used_bytes=i % 7))
            recorder.row(i, None, i % 5000, [i % 300], None)
        return recorder

    short, long = record(2000), record(40_000)
    assert len(long.timeline.bins) <= 320
    assert len(long.prompt_lengths.counts) <= 60
    assert long.prompt_lengths.counts.keys() == {*long.prompt_lengths.counts} | set(
        short.prompt_lengths.counts
    )
    assert sum(b.steps for b in long.timeline.bins) == 40_000
