from __future__ import annotations

import re
from itertools import pairwise
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.jobs.charts import (
    Chart,
    Series,
    byte_ticks,
    clock,
    compact,
    compact_bytes,
    histogram_chart,
    round_ticks,
    time_chart,
    time_ticks,
)
from quire.jobs.recorder import Histogram


def inside(chart: Chart) -> None:
    """All of the chart is within its box, and no two ticks have the same label."""
    for path in re.findall(r' d="([^"]*)"', chart.svg):
        for command, rest in re.findall(r"([MVHZ])([\d. ]*)", path):
            numbers = [float(n) for n in rest.split()]
            assert command == "Z" or numbers
            limits = {"M": (1000, 100), "H": (1000,), "V": (100,), "Z": ()}[command]
            assert all(0 <= n <= limit for n, limit in zip(numbers, limits, strict=True))
    for ticks in (chart.x, chart.y):
        assert all(-1e-6 <= t.at <= 100 + 1e-6 for t in ticks)
        assert len({t.label for t in ticks}) == len(ticks)
        assert all(a.at < b.at for a, b in pairwise(ticks))


@given(st.floats(0, 1e13), st.booleans())
def test_ticks_are_round_few_and_reach_the_top(top: float, whole: bool) -> None:
    ticks = round_ticks(top, whole=whole)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 7
    assert ticks[-1] >= top * (1 - 1e-6)
    assert round(float(f"{ticks[1]:.0e}".split("e")[0])) in (1, 2, 5)
    if whole:
        assert ticks[1] == int(ticks[1])


@given(st.one_of(st.just(0.0), st.floats(1, 1e13)))
def test_bytes_have_ticks_at_powers_of_two(top: float) -> None:
    ticks = byte_ticks(top)
    assert 2 <= len(ticks) <= 7
    assert ticks[-1] >= top * (1 - 1e-6)
    assert log2(ticks[1]) == int(log2(ticks[1]))


@given(st.floats(0.001, 1e9))
def test_time_ticks_fit(seconds: float) -> None:
    ticks, step = time_ticks(seconds)
    assert len(ticks) <= 7
    assert ticks[-1] <= seconds * (1 + 1e-6)
    labels = [clock(t, step) for t in ticks]
    assert len(set(labels)) == len(labels)
    assert all(len(label) <= 8 for label in labels)


@given(
    steps=st.lists(
        st.tuples(st.floats(0.001, 100), st.floats(0, 1e9), st.floats(0, 1e9)),
        min_size=1,
        max_size=30,
    ),
    stacked=st.booleans(),
    limit=st.one_of(st.none(), st.floats(0, 1e12)),
)
def test_charts_stay_in_their_box(
    steps: list[tuple[float, float, float]], stacked: bool, limit: float | None
) -> None:
    edges = [0.0]
    for seconds, _, _ in steps:
        edges.append(edges[-1] + seconds)
    chart = time_chart(
        "Test",
        edges,
        [Series("a", "blue", [s[1] for s in steps]), Series("b", "pale", [s[2] for s in steps])],
        compact_bytes if limit is not None else compact,
        stacked=stacked,
        in_bytes=limit is not None,
        limit=("limit", limit) if limit is not None else None,
    )
    inside(chart)
    assert len(chart.hover.split(";")) == len(steps)
    assert chart.hover.split(";")[-1].split("|")[0] == "100"


def test_stacked_areas_stand_on_each_other() -> None:
    chart = time_chart(
        "Test", [0, 1, 2], [Series("a", "blue", [3, 0]), Series("b", "pale", [1, 4])], stacked=True
    )
    top, bottom = re.findall(r'<path class="(?:blue|pale)" d="([^"]*)"', chart.svg)
    assert top == "M0 100V0H500V0H1000V100Z"
    assert bottom == "M0 100V75H500V0H1000V100Z"
    assert chart.hover == "50|0.0 s to 1.0 s|a: 3|b: 1;100|1.0 s to 2.0 s|a: 0|b: 4"


@pytest.mark.parametrize(("limit", "drawn"), [(100.0, True), (10_000.0, False)])
def test_a_limit_far_away_is_named_not_drawn(limit: float, drawn: bool) -> None:
    chart = time_chart("Test", [0, 1], [Series("used", "green", [50])], limit=("limit", limit))
    assert ('class="limit"' in chart.svg) == drawn
    assert any("limit" in name for name, _ in chart.legend)
    assert any("above" in name for name, _ in chart.legend) != drawn


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=40))
def test_histograms_stay_in_their_box(values: list[int]) -> None:
    data = Histogram()
    for value in values:
        data.add(value)
    chart = histogram_chart("Test", "tokens", "rows", "blue", data)
    inside(chart)
    counts = [int(row.split("rows: ")[1].replace(",", "")) for row in chart.hover.split(";")]
    assert sum(counts) == len(values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (7, "7"), (950, "950"), (1234, "1.23k"), (34e6, "34M"), (2e9, "2G")],
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "step", "text"),
    [
        (0.5, 0.1, "0.5 s"),
        (0.05, 0.05, "0.05 s"),
        (30, 5, "0:30"),
        (3900, 300, "1:05:00"),
        (172800, 86400, "2 d"),
    ],
)
def test_clock(seconds: float, step: float, text: str) -> None:
    assert clock(seconds, step) == text


def test_bytes() -> None:
    assert [compact_bytes(v) for v in (0, 512 << 10, 1.5 * 2**30)] == ["0 B", "512 KiB", "1.5 GiB"]
