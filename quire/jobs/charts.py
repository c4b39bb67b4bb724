"""Charts for an HTML page: SVG shapes from Python, text in HTML.

The SVG is a box of 1000 x 100 units that the page stretches to whatever width it has, so it holds
shapes alone; ticks and legends are HTML at percentages of the box and keep their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log2, log10

from markupsafe import Markup

from quire.jobs.recorder import Histogram

_SECONDS = (
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600,
    7200, 10800, 21600, 43200, 86400,
)  # fmt: skip


@dataclass(frozen=True)
class Tick:
    """``at``: per cent of the axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Series:
    """Values by bin. ``colour``: a class of the page's style."""

    name: str
    colour: str
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """``hover``: for each bin its right edge in per cent and texts, as ``edge|text|...;...``."""

    svg: Markup
    x: list[Tick]
    y: list[Tick]
    legend: list[tuple[str, str]]  # name, colour
    hover: str

    @property
    def crowded(self) -> bool:
        """Whether a narrow page has no room for every label below the chart."""
        return sum(len(tick.label) + 1 for tick in self.x) > 38


def compact(value: float) -> str:
    """``950``, ``1.23k``, ``34M``: three digits for people."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{_short(value / limit)}{unit}"
    return _short(value)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def compact_bytes(value: float) -> str:
    """``512 KiB``, ``1.5 GiB``."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= limit:
            return f"{_short(value / limit)} {unit}"
    return f"{_short(value)} B"


def clock(seconds: float, step: float) -> str:
    """A point in time to the precision of ``step``: ``0.5 s``, ``2:30``, ``1:05:00``, ``3 d``."""
    if step < 1:
        return f"{seconds:.{ceil(-log10(step))}f} s"
    if step >= 86400:
        return f"{seconds / 86400:.0f} d"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def round_ticks(top: float, *, whole: bool = False) -> list[float]:
    """0 and three to five more evenly spaced round values; the last is >= ``top``.

    ``whole``: no fractions.
    """
    want = top / 5 or 0.2
    power = 10.0 ** floor(log10(want))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= want * (1 - 1e-9))
    return _multiples(max(1.0, step) if whole else step, top)


def byte_ticks(top: float) -> list[float]:
    """The same for bytes: multiples of a power of two."""
    return _multiples(2.0 ** ceil(log2(max(1.0, top / 5))), top)


def _multiples(step: float, top: float) -> list[float]:
    return [i * step for i in range(max(1, ceil(top / step - 1e-9)) + 1)]


def time_ticks(seconds: float, most: int = 6) -> tuple[list[float], float]:
    """Round points in time from 0 to ``seconds``, at most ``most`` after 0, and their distance."""
    fits = (step for step in _SECONDS if seconds / step <= most)
    step = next(fits, 86400.0 * ceil(seconds / 86400 / most))
    return [i * step for i in range(floor(seconds / step + 1e-9) + 1)], step


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:g}"  # no minus zero


def _area(edges: Sequence[float], values: Sequence[float], top: float) -> str:
    """The path of a filled staircase. ``edges``: one more than values, 0 to 1000."""
    parts = [f"M{_number(edges[0])} 100"]
    for value, right in zip(values, edges[1:], strict=True):
        parts.append(f"V{_number(100 - 100 * value / top)}H{_number(right)}")
    return "".join(parts) + "V100Z"


def _bars(edges: Sequence[float], values: Sequence[float], top: float) -> str:
    """The path of bars with a gap between them."""
    parts = []
    for value, (left, right) in zip(values, pairwise(edges), strict=True):
        if value:
            gap = 0.08 * (right - left)
            height = _number(100 - max(0.6, 100 * value / top))
            parts.append(f"M{_number(left + gap)} 100V{height}H{_number(right - gap)}V100Z")
    return "".join(parts)


def _svg(label: str, ticks: Sequence[float], shapes: str) -> Markup:
    """The box with horizontal grid lines at ``ticks`` (per cent)."""
    grid = "".join(f"M0 {_number(100 - at)}H1000" for at in ticks)
    return Markup(
        '<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<path class="grid" d="{}"/>{}</svg>'
    ).format(label, grid, Markup(shapes))  # shapes hold numbers and class names


def time_chart(
    label: str,
    edges: Sequence[float],
    series: Sequence[Series],
    show: Callable[[float], str] = compact,
    *,
    stacked: bool = False,
    in_bytes: bool = False,
    limit: tuple[str, float] | None = None,
    extra: Sequence[Series] = (),
) -> Chart:
    """Areas over time, each painted over those before it.

    ``edges``: seconds, one more than there are bins. ``stacked``: each area stands on those after
    it. ``limit``: a named value drawn as a line; where it is far above all values it is only named.
    ``extra``: listed with a bin's values, not drawn.
    """
    end = edges[-1] or 1.0
    drawn = [list(s.values) for s in series]
    if stacked:
        for above, below in reversed(list(pairwise(drawn))):
            above[:] = [a + b for a, b in zip(above, below, strict=True)]
    peak = max((v for values in drawn for v in values), default=0.0)
    shown = limit is not None and limit[1] <= 3 * peak
    top = max(peak, limit[1]) if limit is not None and shown else peak
    levels = byte_ticks(top) if in_bytes else round_ticks(top)
    top = levels[-1]
    places = [1000 * edge / end for edge in edges]
    shapes = "".join(
        f'<path class="{s.colour}" d="{_area(places, values, top)}"/>'
        for s, values in zip(series, drawn, strict=True)
    )
    legend = [(s.name, s.colour) for s in series]
    if limit is not None:
        if shown:
            height = _number(100 - 100 * limit[1] / top)
            shapes += f'<path class="limit" d="M0 {height}H1000"/>'
        note = "" if shown else " (above the scale)"
        legend.append((f"{limit[0]} {show(limit[1])}{note}", "limit" if shown else "none"))
    times, step = time_ticks(end)
    finest = min(0.1, step)
    rows = []
    for i, (start, stop) in enumerate(pairwise(edges)):
        when = f"{_moment(start, finest)} to {_moment(stop, finest)}"
        texts = [f"{s.name}: {show(s.values[i])}" for s in series]
        texts += [f"{s.name}: {compact(s.values[i])}" for s in extra]
        rows.append("|".join([_number(100 * stop / end), when, *texts]))
    return Chart(
        _svg(label, [100 * v / top for v in levels], shapes),
        [Tick(100 * t / end, clock(t, step)) for t in times],
        [Tick(100 * v / top, show(v)) for v in levels],
        legend,
        ";".join(rows),
    )


def _moment(seconds: float, finest: float) -> str:
    return clock(seconds, finest if seconds < 60 else 1)


def histogram_chart(label: str, name: str, what: str, colour: str, data: Histogram) -> Chart:
    """Bars of equal width for the histogram's bins; ``name`` of a value, ``what`` is counted."""
    first, last = min(data.counts), max(data.counts)
    spare = max(0, 11 - (last - first)) // 2
    first = max(0, first - spare)
    last += spare
    numbers = range(first, last + 1)
    values = [float(data.counts[n]) for n in numbers]
    levels = round_ticks(max(values), whole=True)
    edges = [1000 * i / len(numbers) for i in range(len(numbers) + 1)]
    every = ceil(len(numbers) / 6)
    rows = []
    for number, value, right in zip(numbers, values, edges[1:], strict=True):
        low, high = data.bounds(number)
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        rows.append(f"{_number(right / 10)}|{span} {name}|{what}: {value:,.0f}")
    path = f'<path class="{colour}" d="{_bars(edges, values, levels[-1])}"/>'
    return Chart(
        _svg(label, [100 * v / levels[-1] for v in levels], path),
        [
            Tick(edges[i] / 10 + 50 / len(numbers), compact(data.bounds(numbers[i])[0]))
            for i in range(0, len(numbers), every)
        ],
        [Tick(100 * v / levels[-1], compact(v)) for v in levels],
        [],
        ";".join(rows),
    )
