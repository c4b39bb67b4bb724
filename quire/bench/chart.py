"""Charts as SVG files: grouped bars, and lines in panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = (
    "#1b6ca8", "#e07b39", "#4c9f70", "#9067a7", "#b0b0b0", "#c9a227",
    "#d1495b", "#00a6a6", "#7d5a3c", "#e29ac7", "#5b5b5b", "#86b300",
)  # fmt: skip
BAR, GAP, LEFT, TOP, HEIGHT = 26, 28, 64, 62, 240
PANEL, COLUMNS = 340, 4  # width of a panel of lines; names in a row of its legend


def write_bars(
    file: Path,
    title: str,
    groups: Sequence[str],
    names: Sequence[str],
    values: Mapping[tuple[str, str], float],
) -> None:
    """A group of bars for each of ``groups``, a bar for each of ``names``, from zero upwards."""
    most = _round_up(max(values.values(), default=1.0))
    wide = max(BAR * len(names), 7 * max(map(len, groups))) + GAP
    width = max(LEFT + wide * len(groups) + 12, LEFT + 110 * len(names))
    parts = _page(width, TOP + HEIGHT + 36, title)
    for index, name in enumerate(names):
        at = LEFT + 110 * index
        parts.append(_box(at, 32, 12, 12, _colour(index)))
        parts.append(_text(at + 17, 42, name, "start"))
    for tick in range(5):
        y = TOP + HEIGHT * (1 - tick / 4)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{width - 8}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{most * tick / 4:,.0f}", "end"))
    for place, group in enumerate(groups):
        middle = LEFT + wide * (place + 0.5)
        parts.append(_text(middle, TOP + HEIGHT + 20, group, "middle"))
        for index, name in enumerate(names):
            value = values.get((group, name))
            if value is None:
                continue
            x = middle + BAR * (index - len(names) / 2)
            tall = HEIGHT * value / most
            y = TOP + HEIGHT - tall
            parts.append(_box(x + 1, y, BAR - 2, tall, _colour(index)))
            parts.append(_text(x + BAR / 2, y - 3, _short(value), "middle", 9))
    file.write_text("\n".join([*parts, "</svg>", ""]))


@dataclass(frozen=True)
class Line:
    """Named points ``(x, y)``, joined in order."""

    name: str
    points: tuple[tuple[float, float], ...]


def write_lines(file: Path, title: str, panels: Mapping[str, Sequence[Line]]) -> None:
    """Panels side by side with the same lines; x from 0 on, y from 0 to 100.

    Where there are more names than colours, lines are numbered, too.
    """
    points = [p for lines in panels.values() for line in lines for p in line.points]
    most = 25 * ceil(max([100.0, *(x for x, _ in points)]) / 25)
    names = list(dict.fromkeys(line.name for lines in panels.values() for line in lines))
    numbered = len(names) > len(COLOURS)
    rows = -(-len(names) // COLUMNS)
    top = TOP + 16 * rows
    width = LEFT + (PANEL + LEFT) * len(panels)
    parts = _page(width, top + HEIGHT + 36, title)
    for index, name in enumerate(names):
        x, y = LEFT + 170 * (index % COLUMNS), 32 + 16 * (index // COLUMNS)
        parts.append(_box(x, y, 12, 12, _colour(index)))
        parts.append(_text(x + 17, y + 10, f"{index + 1} {name}" if numbered else name, "start"))
    for number, (panel, lines) in enumerate(panels.items()):
        left = LEFT + (PANEL + LEFT) * number
        parts.append(_text(left + PANEL / 2, top - 8, panel, "middle"))
        for tick in range(0, 101, 20):
            height = top + HEIGHT * (1 - tick / 100)
            parts.append(f'<path d="M{left} {height:.1f}h{PANEL}" stroke="#ddd"/>')
            parts.append(_text(left - 6, height + 4, str(tick), "end"))
        for tick in range(0, most + 1, 25 * ceil(most / 200)):
            place = left + PANEL * tick / most
            parts.append(_text(place, top + HEIGHT + 18, str(tick), "middle"))
        for line in lines:
            index = names.index(line.name)
            colour = _colour(index)
            places = [
                (left + PANEL * x / most, top + HEIGHT * (1 - y / 100))
                for x, y in line.points
                if y == y  # NaN: not measured
            ]
            if len(places) > 1:
                path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
                parts.append(f'<path d="M{path}" stroke="{colour}" fill="none"/>')
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places
            ]
            if numbered:
                parts += [_text(x + 5, y - 3, str(index + 1), "start", 9) for x, y in places]
    file.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def _page(width: int, height: int, title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 20, title, "start", 14),
    ]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(power * step for step in (1, 2, 4, 6, 8, 10) if power * step >= value)
