"""What the judge found, as tables (terminal and Markdown), CSV and a plot."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from math import isnan
from pathlib import Path

from quire.bench.chart import Line, write_lines
from quire.bench.kv.cost import Cost
from quire.bench.kv.judge import Fidelity, Judged, Score, mean
from quire.bench.kv.suite import RETRIEVAL, TASKS, TURNS
from quire.engine.budget import format_bytes


@dataclass(frozen=True)
class Table:
    """Text cells; the first column is the recipe."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As Markdown, under its title."""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def tables(found: Sequence[Judged], length: int) -> list[Table]:
    """Scores in both modes, likelihoods, and fidelity and cost, at ``length``."""
    here = [one for one in found if one.length == length]
    scores = here[0].scores  # of the uncompressed cache
    tasks = [task for task in TASKS if any(s.task == task for s in scores)]
    chances = (_percent(mean([s.chance for s in scores if s.task == task])) for task in tasks)

    def alone(one: Judged, task: str) -> str:
        return _percent(score_of(one.scores, [task], "requests"))

    def in_turn(one: Judged, task: str) -> str:
        parts = (score_of(one.scores, [task], "turns", *part) for part in ((1, 1), (2, TURNS)))
        return " / ".join(map(_percent, parts))

    def loss(one: Judged, task: str) -> str:
        mine, whole = (
            mean([s.logprob for s in each if s.task == task]) for each in (one.scores, scores)
        )
        return f"{mine - whole:+.2f}"

    return [
        Table(
            f"{length:,} tokens, a request for each question: score, %",
            ("recipe", *tasks),
            [("by chance", *chances), *_rows(here, tasks, alone)],
        ),
        Table(
            f"{length:,} tokens, all turns in one sequence: score of the first / later turns, %",
            ("recipe", *tasks),
            _rows(here, tasks, in_turn),
        ),
        Table(
            f"{length:,} tokens: log-probability of a right answer's token, against none",
            ("recipe", *tasks),
            _rows(here[1:], tasks, loss),
        ),
        _costs(here, length),
    ]


def _rows(
    here: Sequence[Judged], tasks: Sequence[str], cell: Callable[[Judged, str], str]
) -> list[tuple[str, ...]]:
    return [
        (one.recipe, *(cell(one, task) if one.error is None else "failed" for task in tasks))
        for one in here
    ]


def score_of(
    scores: Iterable[Score], tasks: Sequence[str], mode: str, first: int = 1, last: int = TURNS
) -> float:
    """Mean score of turns ``first`` to ``last`` of ``tasks``; NaN where there are none."""
    return mean(
        [s.score for s in scores if s.task in tasks and s.mode == mode and first <= s.turn <= last]
    )


def _costs(here: Sequence[Judged], length: int) -> Table:
    assert here[0].cost is not None
    whole = here[0].cost.held_per_token
    rows = []
    for one in here:
        fidelity, cost = one.fidelity, one.cost
        if fidelity is None or cost is None:
            rows.append((one.recipe, one.error or "", *[""] * 8))
            continue
        rows.append(
            (
                one.recipe,
                f"{100 * fidelity.agreement:.1f}%",
                f"{fidelity.divergence:.4f}",
                f"{fidelity.perplexity:.2f}",
                f"{cost.held_per_token:,.0f}",
                _held(cost, whole),
                f"{100 * cost.read_per_token / whole:.0f}%",
                format_bytes(cost.peak_bytes),
                f"{cost.prefill_per_second:,.0f}",
                f"{cost.decode_per_second:,.0f}",
            )
        )
    return Table(
        f"{length:,} tokens: prose beside the uncompressed cache, and cost",
        (
            "recipe",
            "same top-1",
            "KL",
            "perplexity",
            "bytes/token",
            "held",
            "read",
            "peak KV",
            "prefill/s",
            "decode/s",
        ),
        rows,
    )


def _held(cost: Cost, whole: float) -> str:
    disk = f" + {100 * cost.disk_per_token / whole:.0f}% disk" if cost.disk_per_token else ""
    return f"{100 * cost.held_per_token / whole:.0f}%{disk}"


def _percent(share: float) -> str:
    return "" if isnan(share) else f"{100 * share:.0f}"


def write_all(found: Sequence[Judged], folder: Path, command: str) -> None:
    """Write scores.csv, recipes.csv, report.md and score.svg into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(
        folder / "scores.csv",
        [f.name for f in fields(Score)],
        [asdict(score) for one in found for score in one.scores],
    )
    _write_csv(
        folder / "recipes.csv",
        ["recipe", "length", *(f.name for kind in (Fidelity, Cost) for f in fields(kind)), "error"],
        [
            {"recipe": one.recipe, "length": one.length, "error": one.error or ""}
            | (asdict(one.fidelity) if one.fidelity is not None else {})
            | (asdict(one.cost) if one.cost is not None else {})
            for one in found
        ],
    )
    lengths = list(dict.fromkeys(one.length for one in found))
    parts = [f"`{command}`", "![score by bytes](score.svg)"]
    parts += [table.markdown() for length in lengths for table in tables(found, length)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot(found, lengths[-1], folder / "score.svg")


def _write_csv(file: Path, names: Sequence[str], rows: Iterable[dict[str, object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(found: Sequence[Judged], length: int, file: Path) -> None:
    """Score against KV bytes held, for requests and for later turns; a line for each method.

    The score is that of retrieval where it was judged, else of all tasks. A method that reads much
    less than it holds has a second line, against the bytes that a decode step reads.
    """
    here = [one for one in found if one.length == length and one.error is None]
    assert here[0].cost is not None
    whole = here[0].cost.held_per_token
    judged = {s.task for s in here[0].scores}
    tasks = [task for task in RETRIEVAL if task in judged] or sorted(judged)
    panels: dict[str, list[Line]] = {}
    for panel, mode, first in (
        ("a request for each question", "requests", 1),
        ("later turns of one sequence", "turns", 2),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for one in here:
            assert one.cost is not None
            score = 100 * score_of(one.scores, tasks, mode, first)
            held, read = one.cost.held_per_token / whole, one.cost.read_per_token / whole
            name = "+".join(part.split("(")[0] for part in one.recipe.split("+"))
            lines.setdefault(name, []).append((100 * held, score))
            if read < 0.9 * held:
                lines.setdefault(f"{name}, read", []).append((100 * read, score))
        panels[panel] = [Line(name, tuple(sorted(points))) for name, points in lines.items()]
    title = f"{', '.join(tasks)}, {length:,} tokens: score, %, by KV bytes, % of uncompressed"
    write_lines(file, title, panels)
