"""The judge end to end on the bundled model, and its tables."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from math import nan
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest

from quire.bench.chart import Line, write_bars, write_lines
from quire.bench.kv.cost import Cost
from quire.bench.kv.forced import Heard
from quire.bench.kv.judge import Fidelity, Judged, Plan, Score, judge, mean, right
from quire.bench.kv.recipes import default_recipes, fill
from quire.bench.kv.report import score_of, tables, write_all
from quire.bench.kv.suite import TURNS
from quire.errors import InvalidRequestError
from quire.kv import recipes
from quire.kv.method import Seen

TINY = Plan(
    ("kivi(bits=4)", "snapkv(budget=25%)"),
    lengths=(256,),
    tasks=("kv", "most-frequent"),
    samples=1,
    rounds=1,
)


@dataclass(frozen=True)
class Broken:
    """Fails when it is asked."""

    axis: ClassVar[str] = "select"
    window: ClassVar[int] = 0
    mass: ClassVar[bool] = False
    every: ClassVar[int | None] = None
    online: ClassVar[bool] = False

    def select(self, seen: Seen) -> Any:  # noqa: ARG002
        raise RuntimeError("no selection today")


@pytest.fixture(scope="module")
def found() -> list[Judged]:
    return list(judge(TINY))


@pytest.mark.slow
def test_every_recipe_is_judged_beside_the_uncompressed_cache(found: list[Judged]) -> None:
    assert [one.recipe for one in found] == ["none", "kivi(bits=4)", "snapkv(budget=25%)"]
    for one in found:
        assert one.error is None
        cells = {(s.task, s.mode, s.turn) for s in one.scores}
        assert len(one.scores) == len(cells) == 2 * 2 * TURNS
        assert all(s.questions == 1 and s.length == 256 for s in one.scores)
        assert {(s.task, s.chance) for s in one.scores} == {("kv", 0.0), ("most-frequent", 0.25)}
        assert all(s.score >= s.exact if s.chance else s.score == s.exact for s in one.scores)
        assert all(s.logprob < 0 < s.reciprocal_rank <= 1 for s in one.scores)
    none = found[0]
    assert none.fidelity is not None
    assert none.fidelity.agreement == 1
    assert none.fidelity.divergence == 0
    assert all(s.agreement == 1 for s in none.scores)
    for one in found[1:]:
        assert one.fidelity is not None
        assert 0 < one.fidelity.divergence < 1
        assert one.cost is not None
        assert none.cost is not None
        assert one.cost.held_per_token < 0.8 * none.cost.held_per_token


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results(found: list[Judged]) -> None:
    again = list(judge(TINY))
    assert [(a.scores, a.fidelity) for a in again] == [(b.scores, b.fidelity) for b in found]


@pytest.mark.slow
def test_a_failing_recipe_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipes.METHODS, "broken", Broken)
    plan = Plan(("broken", "kivi(bits=4)"), lengths=(256,), tasks=("kv",), samples=1, rounds=1)
    none, broken, kivi = judge(plan)
    assert none.error is None
    assert broken.error == "RuntimeError: no selection today"
    assert kivi.error is None
    assert kivi.scores
    shown = tables([none, broken, kivi], 256)
    assert shown[0].rows[2] == ("broken", "failed")
    assert "no selection today" in shown[-1].rows[1][1]


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        (Plan(("none",), tasks=("chess",)), "chess"),
        (Plan(("none",), lengths=(5000,)), "context of 2304"),
        (Plan(("none",), samples=0), "samples"),
        (Plan(("kivy(bits=4)",)), "kivy"),
        (Plan(("none",), lengths=(60,)), "too few"),
    ],
)
def test_what_cannot_be_judged_is_refused(plan: Plan, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word):
        list(judge(plan))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("length", [512, 2048, 100_000])
def test_every_method_is_judged_by_default(quick: bool, length: int) -> None:
    texts = default_recipes(quick)
    assert texts[0] == "none"
    assert {text.split("(")[0] for text in texts} == {"none", *recipes.METHODS}
    assert len(set(texts)) == len(texts)
    for text in texts[1:]:
        assert not recipes.parse(fill(text, length)).plain


def test_shares_are_of_the_length() -> None:
    assert fill("snapkv(budget=25%)+kivi(bits=4)", 2048) == "snapkv(budget=512)+kivi(bits=4)"
    assert fill("a(b=12.5%,c=0.1%)", 400) == "a(b=50,c=1)"
    assert fill("none", 400) == "none"


def test_rules() -> None:
    assert right(Heard(exact=True))
    assert not right(Heard(exact=False))
    assert right(Heard(exact=False, chosen=0))
    assert not right(Heard(exact=True, chosen=1))
    assert mean([]) != mean([])
    assert mean([1.0, 2.0]) == 1.5


def made(recipe: str, score: float, share: float, error: str | None = None) -> Judged:
    if error is not None:
        return Judged(recipe, 512, error=error)
    scores = [
        Score(recipe, 512, task, mode, turn, 8, 0.25, score / turn, score, -2 * share, 0.5, 1.0)
        for task in ("kv", "mixed")
        for mode in ("requests", "turns")
        for turn in range(1, TURNS + 1)
    ]
    cost = Cost(1000 * share, 500 * share, 2**20, 10000.0, 2000.0)
    return Judged(recipe, 512, scores, Fidelity(0.5, 0.25, 40.0), cost)


def test_tables() -> None:
    judged = [made("none", 1.0, 1.0), made("a(b=1)+c", 0.5, 0.5), made("bad", 0, 0, "Error: x")]
    requests, turns, likelihood, costs = tables(judged, 512)
    assert requests.columns == ("recipe", "kv", "mixed")
    assert requests.rows == [
        ("by chance", "25", "25"),
        ("none", "52", "52"),  # of 100, 50, 33 and 25
        ("a(b=1)+c", "26", "26"),
        ("bad", "failed", "failed"),
    ]
    assert turns.rows[0] == ("none", "100 / 36", "100 / 36")
    assert likelihood.rows[0] == ("a(b=1)+c", "+1.00", "+1.00")
    assert costs.rows[1] == (
        "a(b=1)+c", "50.0%", "0.2500", "40.00", "500", "50%", "25%", "1.0 MiB", "10,000", "2,000",
    )  # fmt: skip
    assert all(len(row) == len(t.columns) for t in (requests, turns, costs) for row in t.rows)
    assert judged[1].cost is not None
    judged[1] = replace(judged[1], cost=replace(judged[1].cost, disk_per_token=250.0))
    assert tables(judged, 512)[-1].rows[1][5] == "50% + 25% disk"
    lines = costs.markdown().splitlines()
    assert lines[0].startswith("### 512 tokens")
    assert {line.count("|") for line in lines[2:]} == {len(costs.columns) + 1}
    assert score_of(judged[0].scores, ["kv"], "turns", 2) == pytest.approx(
        (1 / 2 + 1 / 3 + 1 / 4) / 3
    )
    assert score_of([], ["kv"], "turns") != score_of([], ["kv"], "turns")


def test_files(tmp_path: Path) -> None:
    judged = [made("none", 1.0, 1.0), made("a(b=1)", 0.5, 0.5), made("bad", 0, 0, "Error: x")]
    write_all(judged, tmp_path, "quire bench kv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == 2 * 2 * 2 * TURNS
    assert list(scores[0]) == [f.name for f in fields(Score)]
    with (tmp_path / "recipes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == ["none", "a(b=1)", "bad"]
    assert rows[2]["error"] == "Error: x"
    assert float(rows[1]["held_per_token"]) == 500
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("`quire bench kv`")
    assert report.count("###") == 4
    root = ElementTree.parse(tmp_path / "score.svg").getroot()
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    assert len(circles) == 2 * (2 + 2)  # two panels, and what is read apart from what is held


def test_charts(tmp_path: Path) -> None:
    file = tmp_path / "chart.svg"
    lines = [Line("a & b", ((0.0, 0.0), (130.0, 100.0))), Line("c", ((50.0, nan), (60.0, 50.0)))]
    write_lines(file, "title", {"left": lines, "right": []})
    text = file.read_text()
    ElementTree.fromstring(text)
    assert "a &amp; b" in text
    assert text.count("<circle") == 3
    assert "nan" not in text
    width = float(re.findall(r'width="(\d+)"', text)[0])
    assert all(0 <= float(x) <= width for x in re.findall(r'cx="([^"]+)"', text))
    write_bars(file, "title", ["g"], ["a", "b"], {("g", "a"): 10.0, ("g", "b"): 2000.0})
    ElementTree.fromstring(file.read_text())


def quire(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quire", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    done = quire(
        "bench", "kv", "--kv", "kivi(bits=2)", "--length", 256, "--task", "kv", "--samples", 1,
        "--out", tmp_path / "out", "--threads", 1, "--quick",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kivi(bits=2)" in done.stdout
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "scores.csv", "recipes.csv", "report.md", "score.svg",
    }  # fmt: skip
    wrong = quire("bench", "kv", "--task", "chess", "--out", tmp_path / "no")
    assert wrong.returncode == 2
    assert "chess" in wrong.stderr


@pytest.mark.slow
def test_what_is_known_of_the_methods_is_seen() -> None:
    plan = Plan(
        ("kivi(bits=4)", "snapkv(budget=25%)"), lengths=(512,), tasks=("needle",), samples=10,
        rounds=1,
    )  # fmt: skip
    none, kivi, snapkv = judge(plan)

    def score(one: Judged, mode: str, first: int = 1) -> float:
        return score_of(one.scores, ["needle"], mode, first)

    assert score(none, "requests") >= 0.85  # the model can do it
    assert score(kivi, "requests") >= score(none, "requests") - 0.05
    assert score(snapkv, "requests") >= score(none, "requests") - 0.1
    # A selection that has seen the first question only has dropped what the others ask for.
    assert score(snapkv, "turns", 2) < score(none, "turns", 2) - 0.2
    assert score(kivi, "turns", 2) >= score(none, "turns", 2) - 0.07
