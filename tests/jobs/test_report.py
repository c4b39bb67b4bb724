"""The page: well formed, safe whatever it is told, true, and small."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import BUDGET, SETTINGS, decode, fail, make_run, summarise

from quire.api.outputs import Stats
from quire.errors import InputFileError, InvalidRequestError, QuireError
from quire.jobs.recorder import Recorder
from quire.jobs.report import check_writable, make_report, readable, write_report
from quire.jobs.run import Summary
from quire.schedule.groups import Group

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\" onclick=\"alert(3)&amp;"


class Page(HTMLParser):
    """Checks that tags nest; collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}  # of elements with data-figure
        self.script = ""
        self.words: list[str] = []
        self._figure: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), "an attribute comes twice"
        if tag not in VOID:
            self.open.append(tag)
            self._figure = dict(attrs).get("data-figure")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._figure = None

    def handle_data(self, data: str) -> None:
        if self._figure is not None:
            self.texts[self._figure] = self.texts.get(self._figure, "") + data
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self) -> list[str]:
        return [str(attrs["id"]) for _, attrs in self.tags if "id" in attrs]


def page(recorder: Recorder, summary: Summary, **options: object) -> tuple[str, Page]:
    given_options = {
        "settings": SETTINGS,
        "budget": BUDGET,
        "machine": [("cpu", "x86_64, 2 cores")],
        "decode": decode,
        **options,
    }
    text = make_report(summary, recorder, **given_options)  # type: ignore[arg-type]
    return text, Page(text)


@pytest.fixture(scope="module")
def demo() -> tuple[str, Page, Summary]:
    recorder, seconds = make_run(2000)
    summary = summarise(recorder, seconds)
    return *page(recorder, summary), summary


def test_figures_are_those_of_the_summary(demo: tuple[str, Page, Summary]) -> None:
    _, found, summary = demo
    figures = asdict(summary)
    assert found.texts.keys() == figures.keys()
    for name, value in figures.items():
        shown = found.texts[name].replace(",", "")
        if isinstance(value, float):
            assert float(shown) == pytest.approx(value, abs=0.001)
        else:
            assert shown == str(value)
    for figure in (
        f"{summary.output_tokens:,}",
        f"{summary.saved_tokens:,} of {summary.prompt_tokens:,} prompt tokens",
        f"{summary.tokens_per_second:,.0f} tokens/s",
        f"{summary.rows_ok:,} ok, {summary.rows_failed:,} failed",
    ):
        assert figure in found.text()


def test_all_parts_are_there_and_ids_are_unique(demo: tuple[str, Page, Summary]) -> None:
    _, found, _ = demo
    ids = found.ids()
    assert len(set(ids)) == len(ids)
    assert {
        "failures", "throughput", "batch", "memory", "prefixes", "prompts", "outputs", "time",
        "settings",
    } <= set(ids)  # fmt: skip


def test_the_page_needs_no_network_and_runs_one_script(demo: tuple[str, Page, Summary]) -> None:
    text, found, _ = demo
    assert "http:" not in text
    assert "https:" not in text
    assert not {"src", "href"} & {name for _, attrs in found.tags for name in attrs}
    assert [tag for tag, _ in found.tags].count("script") == 1
    (policy,) = [a["content"] for _, a in found.tags if a.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(found.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert "default-src 'none'" in str(policy)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(evil=st.one_of(st.just(EVIL), st.text(max_size=60)))
def test_everything_from_outside_is_escaped(evil: str) -> None:
    recorder, seconds = make_run(50, failing=0)
    recorder.row(7, evil, 0, (), InvalidRequestError(evil, field="prompt"))
    recorder.groups([Group(b"evil", 0, 90, (1,), 10, 0, 10**9)])
    summary = replace(summarise(recorder, seconds), model=evil)
    text, found = page(
        recorder,
        summary,
        settings={"source": evil or "x", "stop": [evil]},
        decode=lambda _: evil,
    )
    tags = {tag for tag, _ in found.tags}
    assert "img" not in tags
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    clean = page(*_plain(50))[1]
    assert [t for t in found.tags if t[0] == "svg"] == [t for t in clean.tags if t[0] == "svg"]
    assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text)


def _plain(rows: int) -> tuple[Recorder, Summary]:
    recorder, seconds = make_run(rows, failing=0)
    return recorder, summarise(recorder, seconds)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_nothing(steps: int) -> None:
    recorder = Recorder()
    recorder.start(Stats())
    for _ in range(steps):
        recorder.step(Stats())
    _, found = page(recorder, summarise(recorder, 0.25))
    assert "no rows" in found.text()
    assert "failures" not in found.ids()


def test_a_run_that_only_fails() -> None:
    recorder = Recorder()
    recorder.start(Stats())
    for line in range(1, 101):
        fail(recorder, line, line % 3)
    _, found = page(recorder, summarise(recorder, 0.25))
    text = found.text()
    assert "Done, 100 rows failed" in text
    assert "InvalidRequestError (model) line 2 request-0000002" in text
    assert "No steps" in text
    assert "throughput" not in found.ids()


def test_one_step_one_row() -> None:
    now = 0.0
    recorder = Recorder(clock=lambda: now)
    recorder.start(Stats())
    now = 0.125
    recorder.row(1, None, 7, [1], None)
    recorder.step(Stats(steps=1, prompt_tokens=7, computed_tokens=7, output_tokens=1))
    _, found = page(recorder, summarise(recorder, 0.25))
    assert {"throughput", "prompts", "outputs"} <= set(found.ids())
    hover = [str(attrs["data-hover"]) for _, attrs in found.tags if "data-hover" in attrs]
    assert "computed: 56" in hover[0]  # 7 tokens in an eighth of a second
    assert any("7 tokens|rows: 1" in text for text in hover)


def test_resumed_and_interrupted_runs_say_so() -> None:
    recorder, seconds = make_run(50)
    recorder.rows_before = 1234
    _, found = page(recorder, summarise(recorder, seconds, interrupted=True))
    assert "Interrupted" in found.text()
    assert "1,234 rows were finished before" in found.text()


@pytest.mark.slow
def test_a_long_job_has_a_small_page() -> None:
    recorder, seconds = make_run(200_000, failing=0.05)
    for line in range(60):
        name = chr(97 + line % 26) * (1 + line // 26)
        error = InvalidRequestError(f"{name} {'<&>' * 1000}", field="prompt")
        recorder.row(line, "\u202e<&>" * 500, 0, (), error)
    recorder.groups([Group(bytes([i, 9]), 0, 99, (i,), 9, 0, 10**9) for i in range(64)])
    text, _ = page(recorder, summarise(recorder, seconds), decode=lambda _: "<&>'" * 2000)
    assert len(text.encode()) < 300_000


@given(st.text(alphabet=st.characters(), max_size=50), st.integers(1, 30))
def test_readable_is_one_short_printable_line(text: str, longest: int) -> None:
    found = readable(text, longest)
    assert len(found) <= longest
    assert found.isprintable()
    assert readable(found, longest) == found


def test_readable_keeps_what_people_read() -> None:
    assert readable("a\n\nb\tc  d\x00\u202e\ud800ü漢") == "a ↵ ↵ b c dü漢"


def test_unwritable_reports_are_refused_early(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.html")
    for path in (tmp_path, tmp_path / "none" / "x.html"):
        with pytest.raises(InputFileError, match="cannot be written"):
            check_writable(path)
    with pytest.raises(QuireError, match="results are complete"):
        write_report(tmp_path, "x")
    write_report(tmp_path / "x.html", "lone \ud800")
