from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import JournalError
from quire.jobs import journal as module
from quire.jobs.journal import Finished, Journal, remove
from quire.jobs.lock import is_locked, locked


def row(index: int, failed: bool = False, line: str | None = None) -> Finished:
    key = bytes(16) if index % 2 else None
    return Finished(index, bytes([index % 256]) * 8, key, failed, line or f'{{"row": {index}}}')


def make(path: Path, rows: list[Finished]) -> Path:
    with Journal(path) as journal:
        journal.create(counts=[0, 0])
        journal.add(rows, counts=[len(rows), sum(r.failed for r in rows)])
    return path


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(st.integers(0, 70), max_size=5),
    page=st.integers(1, 9),
    order=st.randoms(use_true_random=False),
)
def test_what_is_added_is_read_in_input_order(
    tmp_path_factory: pytest.TempPathFactory, batches: list[int], page: int, order: object
) -> None:
    indexes = list(range(0, 3 * sum(batches), 3))  # with gaps
    order.shuffle(indexes)  # type: ignore[attr-defined]
    path = tmp_path_factory.mktemp("journal") / "j"
    with pytest.MonkeyPatch.context() as patch, Journal(path) as journal:
        patch.setattr(module, "PAGE_ROWS", page)
        patch.setattr(module, "_MOST_ROWS", 32)
        assert journal.blank
        journal.create(counts=[0, 0])
        assert (journal.last(), list(journal.finished()), list(journal.lines())) == (-1, [], [])
        start = 0
        for size in batches:
            journal.add([row(i) for i in indexes[start : start + size]], counts=[start + size, 0])
            start += size
        known = sorted(indexes)
        assert journal.get("counts") == ([start, 0] if batches else [0, 0])
        assert journal.last() == (known[-1] if known else -1)
        assert list(journal.finished()) == [row(i)[:3] for i in known]
        assert list(journal.finished(5)) == [row(i)[:3] for i in known if i >= 5]
        assert list(journal.lines()) == [(i, row(i).line) for i in known]
        assert journal.text(1, 50) == "".join(f"{row(i).line}\n" for i in known if 1 <= i < 50)
        assert [journal.line(i) for i in known] == [row(i).line for i in known]
        assert journal.line(1) is None


def test_others_read_while_one_writes(tmp_path: Path) -> None:
    path = make(tmp_path / "j", [row(0)])
    with Journal(path) as writer, Journal(path) as reader:
        with writer._transaction():
            writer._db.execute("DELETE FROM rows")
            assert reader.line(0) == row(0).line
        assert reader.line(0) is None


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with Journal(make(tmp_path / "j", [row(3)])) as journal:
        with pytest.raises(JournalError):
            journal.add([row(2), row(3)], counts=[9, 9])  # 3 is there already
        assert journal.get("counts") == [1, 0]
        assert [i for i, _ in journal.lines()] == [3]
        journal.add([row(2)], counts=[2, 0])


def test_failed_rows_are_forgotten(tmp_path: Path) -> None:
    with Journal(make(tmp_path / "j", [row(0), row(1, True), row(2, True)])) as journal:
        journal.remove_failed(counts=[1, 0], exported=None)
        assert [i for i, _ in journal.lines()] == [0]
        assert journal.get("counts") == [1, 0]


def test_what_is_no_journal_is_refused_and_kept(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"once upon a time" * 99)
    with pytest.raises(JournalError, match=r"is damaged: file is not a database.*--fresh"):
        Journal(garbage)
    assert garbage.read_bytes() == b"once upon a time" * 99
    foreign = tmp_path / "foreign"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(JournalError, match="is not a journal of quire"):
        Journal(foreign)
    newer = make(tmp_path / "newer", [row(0)])
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(JournalError, match=r"has format 9; this quire reads 1.*--fresh"):
        Journal(newer)
    with pytest.raises(JournalError, match="cannot be written: No such file or directory"):
        Journal(tmp_path / "nowhere" / "j")


def big(path: Path) -> list[Finished]:
    """A journal of many pages."""
    rows = [row(i, line=f'{{"row": {i}, "text": "{"x" * 400}"}}') for i in range(2000)]
    make(path, rows)
    return rows


@pytest.mark.parametrize("cut", [0.3, 0.7])
def test_a_truncated_journal_says_so_and_gives_what_is_left(tmp_path: Path, cut: float) -> None:
    path = tmp_path / "j"
    rows = big(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(JournalError, match=r"is damaged.*--fresh.*quire jobs export"):
        Journal(path)
    problems: list[JournalError] = []
    with Journal(path, salvage=True) as journal:
        found = list(journal.salvage(problems.append))
    assert len(problems) == 1
    assert 0.8 < len(found) / (2000 * cut) < 1.1
    assert found == sorted(found)
    assert set(found) <= {(r.idx, r.line) for r in rows}


def test_damage_in_the_middle_costs_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "j"
    rows = big(path)
    data = bytearray(path.read_bytes())
    place = data.find(b'"row": 1000,')
    page = place // 4096 * 4096
    data[page : page + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    problems: list[JournalError] = []
    with Journal(path, salvage=True) as journal:
        found = list(journal.salvage(problems.append))
    assert len(problems) == 1
    lost = {r.idx for r in rows} - {index for index, _ in found}
    assert 1000 in lost
    assert len(lost) < 20
    assert found == [(r.idx, r.line) for r in rows if r.idx not in lost]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = make(tmp_path / "j", [])
    assert not is_locked(path)
    with Journal(path) as journal:
        journal.set(pid=4711)
    message = r"Another run has this job: process 4711\."
    with locked(path):
        assert is_locked(path)
        with pytest.raises(JournalError, match=message), locked(path):
            pass
    assert not is_locked(path)
    with pytest.raises(JournalError, match="cannot be written"), locked(tmp_path / "no" / "j"):
        pass


def test_remove_takes_what_lies_beside(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    journal.create()
    assert {p.name for p in tmp_path.iterdir()} == {"j", "j-wal", "j-shm"}
    remove(path)
    assert not list(tmp_path.iterdir())
    journal.close()
    remove(path)


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """The lock is the system's, not the file's: one that was left lying means nothing."""
    path = tmp_path / "j"
    Path(f"{path}.lock").touch()
    assert not is_locked(path)
    with FileLock(f"{path}.lock", thread_local=False):
        assert is_locked(path)
