"""Grouped bars as an SVG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ("#1b6ca8", "#e07b39", "#4c9f70", "#9067a7", "#b0b0b0", "#c9a227")
BAR, GAP, LEFT, TOP, HEIGHT = 26, 28, 64, 62, 240


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
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 36}" '
        f'width="{width}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 20, title, "start", 14),
    ]
    for index, name in enumerate(names):
        at = LEFT + 110 * index
        parts.append(_box(at, 32, 12, 12, COLOURS[index % len(COLOURS)]))
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
            parts.append(_box(x + 1, y, BAR - 2, tall, COLOURS[index % len(COLOURS)]))
            parts.append(_text(x + BAR / 2, y - 3, _short(value), "middle", 9))
    file.write_text("\n".join([*parts, "</svg>", ""]))


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
