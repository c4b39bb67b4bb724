from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InputFileError
from quire.jobs import output as module
from quire.jobs.journal import Finished, Journal
from quire.jobs.output import Order, fits, is_stream, open_output


def row(index: int) -> Finished:
    return Finished(index, bytes(8), None, False, f'{{"row": {index}, "text": "{"ü" * index}"}}')


def commit(journal: Journal, output: Any, indexes: list[int]) -> None:
    """What the writing thread does with a batch."""
    rows = {i: row(i) for i in indexes}
    journal.add(list(rows.values()), exported=output.mark())
    output.extend(rows, journal)


@settings(max_examples=150, deadline=None)
@given(
    order=st.sampled_from(["input", "completion"]),
    count=st.integers(0, 40),
    batch=st.integers(1, 12),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_the_output_is_the_journal_wherever_a_kill_strikes(
    tmp_path_factory: pytest.TempPathFactory,
    order: Order,
    count: int,
    batch: int,
    chunk: int,
    seed: int,
) -> None:
    """Kills between commit and export, within a write, and at the start of the next run."""
    chance = random.Random(seed)
    folder = tmp_path_factory.mktemp("output")
    path = folder / "out.jsonl"
    todo = list(range(count))
    chance.shuffle(todo)
    said: list[int] = []  # in the order of commits
    with pytest.MonkeyPatch.context() as patch, Journal(folder / "j", durable=False) as journal:
        patch.setattr(module, "CHUNK_ROWS", chunk)
        patch.setattr(module, "_TAIL_BYTES", 64)
        journal.create(exported=None)
        while True:
            output = open_output(str(path), order, journal.get("exported"), ())
            output.resume(journal)
            if chance.random() < 0.9:
                journal.set(exported=output.mark())
            killed = False
            while todo and not killed:
                now, todo = todo[:batch], todo[batch:]
                said += now
                killed = chance.random() < 0.3
                if killed:
                    journal.add([row(i) for i in now], exported=output.mark())
                    whole = "".join(f"{row(i).line}\n" for i in now).encode()
                    with path.open("ab") as file:  # a write that was cut off anywhere
                        file.write(whole[: chance.randrange(len(whole) + 1)])
                else:
                    commit(journal, output, now)
            output.close()
            if not killed:
                break
        ends = sorted(said) if order == "input" else said
        assert path.read_text() == "".join(f"{row(i).line}\n" for i in ends)


def test_in_input_order_the_output_ends_before_the_first_gap(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(tmp_path / "j") as journal:
        journal.create(exported=None)
        output = open_output(str(path), "input", None, ())
        output.resume(journal)
        written = []
        for indexes in ([3, 1], [0], [5, 2], [4]):
            commit(journal, output, indexes)
            written.append(len(path.read_text().splitlines()))
        output.close()
    assert written == [0, 2, 4, 6]


@pytest.mark.parametrize("change", ["deleted", "shorter", "changed", "other order"])
def test_an_output_that_was_changed_is_written_again(tmp_path: Path, change: str) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(tmp_path / "j") as journal:
        journal.create(exported=None)
        output = open_output(str(path), "input", None, ())
        output.resume(journal)
        commit(journal, output, [1, 0, 2])
        journal.set(exported=output.mark())
        output.close()
        whole = path.read_bytes()
        if change == "deleted":
            path.unlink()
        elif change == "shorter":
            path.write_bytes(whole[:-4])
        elif change == "changed":
            path.write_bytes(whole[:-4] + b"!!!!")
        order: Order = "completion" if change == "other order" else "input"
        output = open_output(str(path), order, journal.get("exported"), ())
        output.resume(journal)
        output.close()
    expected = [1, 0, 2] if change == "other order" else [0, 1, 2]
    assert path.read_text() == "".join(f"{row(i).line}\n" for i in expected)


def test_what_is_beyond_the_mark_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(tmp_path / "j") as journal:
        journal.create(exported=None)
        output = open_output(str(path), "completion", None, ())
        output.resume(journal)
        commit(journal, output, [7])
        mark = output.mark()
        assert mark is not None
        output.close()
        with path.open("a") as file:
            file.write('{"half')
        assert fits(path, mark)
        output = open_output(str(path), "completion", mark, ())
        output.resume(journal)
        output.close()
    assert path.read_text() == f"{row(7).line}\n"


def test_a_stream_gets_everything_and_at_an_interrupt_what_was_held_back(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.create(exported=None)
        journal.add([row(0), row(2)])
        output = open_output("-", "input", None, ())
        output.resume(journal)
        commit(journal, output, [4])
        assert capsysbinary.readouterr().out.decode() == f"{row(0).line}\n"
        output.finish(journal, complete=False)
        output.close()
    assert capsysbinary.readouterr().out.decode() == f"{row(2).line}\n{row(4).line}\n"


def test_what_is_a_stream(tmp_path: Path) -> None:
    assert is_stream("-")
    assert is_stream("/dev/null")
    assert not is_stream(str(tmp_path / "new"))


def test_an_output_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "no" / "out"):
        with pytest.raises(InputFileError, match="cannot be written"):
            open_output(str(name), "input", None, ())
