"""Jobs that are cut short and gone on with, with a fake model."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_llm import FakeLLM
from quire.decode.params import SamplingParams
from quire.decode.rng import row_seed
from quire.errors import InputFileError, JournalError
from quire.jobs import run as module
from quire.jobs import writer
from quire.jobs.job import Job
from quire.jobs.journal import Journal
from quire.jobs.lock import locked
from quire.jobs.progress import Lines
from quire.jobs.run import run_job
from quire.jobs.summary import Summary


class Bench:
    """A folder with an input, and runs of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.job = Job(
            (str(self.source),),
            str(self.output),
            SamplingParams(),
            seed=3,
            settings={"temperature": 1.0, "seed": 3},
        )
        self.asked: list[str] = []  # prompts computed, over all runs
        self.said: list[str] = []
        self.loads = 0

    def rows(self, records: list[Any]) -> None:
        text = [r if isinstance(r, str) else json.dumps(r) for r in records]
        self.source.write_text("".join(f"{line}\n" for line in text))

    def run(self, stop_after: int | None = None, window: int = 7, **changes: Any) -> Summary:
        """One run; Ctrl-C when ``stop_after`` prompts have been computed in it."""
        left = stop_after

        def ask(prompt: str) -> None:
            nonlocal left
            if left is not None:
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            self.asked.append(prompt)

        def load() -> FakeLLM:
            self.loads += 1
            return FakeLLM(ask, window=window)

        return run_job(
            replace(self.job, **changes), load, view=Lines(sys.stderr), say=self.said.append
        )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]

    def texts(self) -> list[str | None]:
        return [
            line["response"]["body"]["choices"][0]["text"] if line["response"] else None
            for line in self.lines()
        ]

    def undisturbed(self, **changes: Any) -> bytes:
        """The output of one run from beginning to end, with the same time of creation."""
        twin = Bench(self.folder / "twin")
        twin.folder.mkdir()
        shutil.copy(self.source, twin.source)
        # Messages name the input as it was given.
        job = replace(self.job, source=(str(self.source),), output=str(twin.output))
        twin.job = replace(job, **changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("quire.jobs.job.time.time", lambda: self.created())
            twin.run()
        found = twin.output.read_bytes()
        shutil.rmtree(twin.folder)
        return found

    def created(self) -> int:
        with Journal(Path(f"{self.output}.journal")) as journal:
            return int(journal.get("created"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def numbered(count: int) -> list[Any]:
    """Good and bad rows, greedy and sampled ones, some of them equal."""
    rows: list[Any] = []
    for i in range(count):
        if i % 7 == 3:
            rows.append("{broken")
        elif i % 11 == 5:
            rows.append({"prompt": f"too long {i}"})
        elif i % 5 == 4:
            rows.append({"prompt": f"again {i % 3}", "temperature": 0, "custom_id": f"id {i}"})
        else:
            rows.append({"prompt": f"row {i}", "n": 1 + i % 2})
    return rows


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 60),
    stops=st.lists(st.integers(0, 25), max_size=4),
    window=st.integers(1, 20),
    commit=st.integers(1, 12),
)
def test_a_job_in_pieces_is_the_whole_job(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    stops: list[int],
    window: int,
    commit: int,
) -> None:
    """Interrupted anywhere: the same bytes, and nothing is computed twice."""
    bench = Bench(tmp_path_factory.mktemp("job"))
    bench.rows(numbered(count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "COMMIT_ROWS", commit)
        before = 0
        for stop in stops:
            found = bench.run(stop, window)
            assert found.rows_before == before
            before = found.rows
            assert found.state in ("interrupted", "done")
            if found.state == "interrupted":
                assert "the same command goes on" in found.text()
        found = bench.run(None, window)
    assert (found.state, found.rows, found.rows_before) == ("done", count, before)
    assert len(bench.asked) == len(set(bench.asked))
    assert bench.output.read_bytes() == bench.undisturbed()
    assert found.rows_failed == sum(line["error"] is not None for line in bench.lines())


def test_a_finished_job_needs_no_model(bench: Bench) -> None:
    bench.rows(numbered(20))
    first = bench.run()
    assert (bench.loads, first.rows_before) == (1, 0)
    whole = bench.output.read_bytes()
    bench.output.unlink()
    again = bench.run()
    assert bench.loads == 1
    assert bench.output.read_bytes() == whole
    assert (again.rows_ok, again.rows_failed) == (first.rows_ok, first.rows_failed)
    assert "Nothing is left to do" in again.text()


def test_empty_input_one_row_and_bad_rows_alone(bench: Bench) -> None:
    bench.rows(["", "  "])
    assert bench.run().rows == 0
    assert bench.loads == 0
    assert bench.output.read_text() == ""
    bench.rows([{"prompt": "one"}])
    assert bench.run().rows == 1
    bench.rows([{"prompt": "one"}, "{", "[]"])
    found = bench.run()
    assert (found.rows_ok, found.rows_failed, found.rows_before) == (1, 2, 1)
    assert [line["id"] for line in bench.lines()] == ["line-1", "line-2", "line-3"]


def test_a_limit_may_grow_and_shrink(bench: Bench) -> None:
    bench.rows(numbered(30))
    assert bench.run(limit=10).rows == 10
    assert bench.run(limit=25).rows == 25
    assert bench.run(limit=5).rows == 25
    assert bench.run(limit=10).rows_before == 25
    assert bench.run().rows == 30
    assert len(bench.asked) == len(set(bench.asked))
    assert bench.output.read_bytes() == bench.undisturbed()


def test_sampled_rows_have_the_seed_of_their_place(bench: Bench) -> None:
    bench.rows([{"prompt": "a"}, "{", {"prompt": "b", "seed": 9}, {"prompt": "c"}])
    bench.run(stop_after=1, window=1)
    bench.run()
    seeds = [text.split()[1] if text else None for text in bench.texts()]
    assert seeds == [str(row_seed(3, 0)), None, "9", str(row_seed(3, 3))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [*rows[:4], {"prompt": "other"}, *rows[5:]],
            r"Row 5 \(line 5 of .*jsonl\)",
        ),
        (lambda rows: rows[:6], "The input ends after 6 rows, but row 7 has been run"),
        (lambda rows: rows[1:], "Row 1 .* is not what it was"),
        (lambda _: [], "The input ends after 0 rows"),
    ],
)
def test_a_changed_input_is_refused(
    bench: Bench, change: Callable[[list[Any]], list[Any]], message: str
) -> None:
    rows = [{"prompt": f"row {i}"} for i in range(20)]
    bench.rows(rows)
    bench.run(limit=12)
    whole = bench.output.read_bytes()
    bench.rows(change(rows))
    with pytest.raises(JournalError, match=message):
        bench.run()
    assert bench.loads == 1  # found before a model was loaded
    assert bench.output.read_bytes() == whole
    bench.rows([*rows, {"prompt": "one more"}])  # behind what has been run, everything may change
    assert bench.run().rows == 21


def test_a_pipe_is_compared_as_it_comes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def feed(rows: list[Any]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (bench.folder / "piped").write_text(text)
        monkeypatch.setattr(sys, "stdin", (bench.folder / "piped").open())

    bench.job = replace(bench.job, source=("-",))
    rows = [{"prompt": f"row {i}"} for i in range(20)]
    feed(rows)
    assert bench.run(stop_after=9).state == "interrupted"
    feed([*rows[:3], {"prompt": "other"}, *rows[4:]])
    with pytest.raises(JournalError, match=r"Row 4 \(line 4 of -\)"):
        bench.run()
    feed(rows)
    assert bench.run().state == "done"
    assert len(bench.asked) == len(set(bench.asked)) == 20


def test_changed_settings_are_refused_by_name(bench: Bench) -> None:
    bench.rows(numbered(9))
    bench.run(stop_after=3)
    changed = {"temperature": 0.5, "seed": 3, "stop": ["x"]}
    with pytest.raises(JournalError, match=r"temperature: 1\.0 -> 0\.5; stop: None -> \['x'\]"):
        bench.run(settings=changed)
    assert bench.run(settings=changed, fresh=True).rows_before == 0
    assert bench.run(settings=changed).rows == 9


def test_settings_may_change_until_a_row_is_finished(bench: Bench) -> None:
    bench.rows([{"prompt": "a"}])
    bench.run(stop_after=0)
    assert bench.run(settings={"temperature": 0.5}).state == "done"


def test_files_of_others_are_not_touched(bench: Bench) -> None:
    bench.rows(numbered(9))
    bench.output.write_text("mine\n")
    with pytest.raises(InputFileError, match=r"exists already.*--fresh"):
        bench.run()
    assert sorted(p.name for p in bench.folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    with pytest.raises(InputFileError, match="would replace the input"):
        bench.run(output=str(bench.source), fresh=True)
    bench.run(fresh=True)
    assert len(bench.lines()) == 9
    other = bench.folder / "other.jsonl"
    other.write_text("mine\n")
    journal = Path(f"{bench.output}.journal")
    with pytest.raises(InputFileError, match="exists already"):
        bench.run(output=str(other), journal=journal)
    assert other.read_text() == "mine\n"
    moved = bench.output.rename(bench.folder / "moved.jsonl")
    assert bench.run(output=str(moved), journal=journal).rows_before == 9


def test_orders(bench: Bench) -> None:
    bench.rows([{"prompt": f"row {i}"} for i in range(40)])
    bench.run(stop_after=15, order="completion")
    early = bench.output.read_bytes()
    assert len(early.splitlines()) == 15
    bench.run(order="completion")
    assert bench.output.read_bytes().startswith(early)
    done = bench.output.read_bytes().splitlines()
    assert done != sorted(done, key=lambda line: json.loads(line)["response"]["body"]["id"])
    bench.run(order="input")
    assert sorted(done) == sorted(bench.output.read_bytes().splitlines())
    assert bench.output.read_bytes() == bench.undisturbed()


def test_one_run_at_a_time(bench: Bench) -> None:
    bench.rows(numbered(3))
    lock = locked(Path(f"{bench.output}.journal"))
    with lock, pytest.raises(JournalError, match="Another run has this job"):
        bench.run()
    assert bench.run().state == "done"


def test_cancelling_ends_a_run_like_an_interrupt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CANCEL_SECONDS", 0.0)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.01)
    bench.rows([{"prompt": f"row {i}"} for i in range(2000)])
    started = threading.Event()
    path = Path(f"{bench.output}.journal")

    def cancel() -> None:
        started.wait()
        with Journal(path) as journal:
            journal.set(cancel=True)

    thread = threading.Thread(target=cancel)
    thread.start()

    class Slow(FakeLLM):
        def _answer(self, *words: Any) -> Any:
            started.set()
            threading.Event().wait(0.002)
            return super()._answer(*words)

    found = run_job(bench.job, Slow, view=Lines(sys.stderr), say=bench.said.append)
    thread.join()
    assert found.state == "cancelled"
    assert 0 < found.rows < 2000
    assert bench.run().state == "done"
    assert len(bench.lines()) == 2000


def test_what_goes_to_standard_output_leaves_nothing_behind(
    bench: Bench, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    bench.rows(numbered(30))
    found = bench.run(output="-")
    assert not found.resumable
    assert len(capsysbinary.readouterr().out.splitlines()) == 30
    bench.run(output="-", stop_after=9)
    kept = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    computed = {row["custom_id"] for row in kept if row["response"]}
    assert len(computed) >= 9
    assert [p.name for p in bench.folder.iterdir()] == ["in.jsonl"]


def test_standard_output_with_a_journal_begins_from_the_start(
    bench: Bench, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    bench.rows(numbered(30))
    journal = bench.folder / "j"
    assert bench.run(output="-", journal=journal, stop_after=9).resumable
    capsysbinary.readouterr()
    bench.run(output="-", journal=journal)
    assert len(capsysbinary.readouterr().out.splitlines()) == 30
    assert len(bench.asked) == len(set(bench.asked))


# Equal rows


def test_equal_rows_are_computed_once(bench: Bench) -> None:
    same = {"prompt": "same", "temperature": 0, "n": 2}
    rows = [
        {**same, "custom_id": "first"},
        {"prompt": "sampled"},
        {"prompt": "sampled"},
        {**same, "custom_id": "second"},
        {"prompt": "seeded", "seed": 1},
        {"prompt": "seeded", "seed": 1},
        {"prompt": "seeded", "seed": 2},
        {**same, "max_tokens": 3},
        {"prompt": "too long", "temperature": 0},
        {"prompt": "too long", "temperature": 0, "custom_id": "also"},
    ]
    bench.rows(rows)
    found = bench.run()
    assert found.duplicates == 3
    assert sorted(bench.asked) == sorted(
        ["same", "sampled", "sampled", "seeded", "seeded", "same", "too long"]
    )
    lines = bench.lines()
    first, second = lines[0]["response"], lines[3]["response"]
    assert (lines[3]["id"], lines[3]["custom_id"]) == ("line-4", "second")
    assert (second["request_id"], second["body"]["id"]) == ("line-4", "cmpl-3")
    assert second["body"]["choices"] == first["body"]["choices"]
    usage = second["body"]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] == 4
    assert usage["completion_tokens"] == first["body"]["usage"]["completion_tokens"]
    assert (lines[9]["custom_id"], lines[9]["error"]["line"]) == ("also", 10)
    bench.run(fresh=True, dedupe=False)
    assert len(bench.asked) == 7 + 10


@pytest.mark.parametrize("most", [0, 3, 1000])
def test_thousands_of_equal_rows_wait_for_few(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", most)
    bench.rows([{"prompt": f"p{i % 3}", "seed": 1, "custom_id": f"c{i}"} for i in range(500)])
    found = bench.run(window=10)
    assert found.duplicates == 500 - len(bench.asked)
    # What cannot wait is computed again; after two windows the first answers are there.
    assert len(bench.asked) <= (3 if most == 1000 else 3 + 2 * 10 + 10)
    for i, line in enumerate(bench.lines()):
        assert line["custom_id"] == f"c{i}"
        assert line["response"]["body"]["choices"][0]["text"] == f"p{i % 3} 1 0 ü"


def test_rows_finished_by_an_earlier_run_are_not_computed_again_for_their_copies(
    bench: Bench,
) -> None:
    bench.rows([{"prompt": f"p{i % 10}", "temperature": 0} for i in range(10)])
    bench.run()
    bench.rows([{"prompt": f"p{i % 10}", "temperature": 0} for i in range(40)])
    found = bench.run()
    assert (found.rows, found.duplicates, len(bench.asked)) == (40, 30, 10)
    assert bench.output.read_bytes() == bench.undisturbed()
