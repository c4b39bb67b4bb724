from __future__ import annotations

import os
from pathlib import Path

import pytest

from quire.fleet import cores
from quire.fleet.cores import divide_cores, numa_nodes, pin


def machine(folder: Path, nodes: dict[int, str], siblings: dict[int, str]) -> Path:
    for number, cpulist in nodes.items():
        (folder / f"node/node{number}").mkdir(parents=True)
        (folder / f"node/node{number}/cpulist").write_text(cpulist + "\n")
    for core, text in siblings.items():
        (folder / f"cpu/cpu{core}/topology").mkdir(parents=True)
        (folder / f"cpu/cpu{core}/topology/thread_siblings_list").write_text(text + "\n")
    return folder


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes of four cores with two hardware threads each."""
    monkeypatch.setattr(cores, "_allowed", lambda: set(range(16)))
    siblings = {core: f"{core % 8},{core % 8 + 8}" for core in range(16)}
    return machine(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, siblings)


def test_nodes_with_the_threads_of_a_core_together(two_nodes: Path) -> None:
    assert numa_nodes(two_nodes) == [
        [0, 8, 1, 9, 2, 10, 3, 11],
        [4, 12, 5, 13, 6, 14, 7, 15],
    ]


def test_no_core_is_shared(two_nodes: Path) -> None:
    assert divide_cores(2, two_nodes) == numa_nodes(two_nodes)
    assert divide_cores(4, two_nodes)[1] == [2, 10, 3, 11]
    for workers in (1, 2, 3, 5, 16):
        parts = divide_cores(workers, two_nodes)
        assert sorted(core for part in parts for core in part) == list(range(16))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_workers_than_cores(two_nodes: Path) -> None:
    parts = divide_cores(20, two_nodes)
    assert all(len(part) == 1 for part in parts)
    assert len({part[0] for part in parts}) == 16


def test_only_allowed_cores(two_nodes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: {1, 9, 5})
    assert numa_nodes(two_nodes) == [[1, 9], [5]]
    monkeypatch.setattr(cores, "_allowed", lambda: {2})
    assert divide_cores(1, two_nodes) == [[2]]


def test_without_a_word_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: {0, 1, 2})
    assert numa_nodes(tmp_path) == [[0, 1, 2]]
    (tmp_path / "node/node0").mkdir(parents=True)
    (tmp_path / "node/node0/cpulist").write_text("0-1\n")  # it does not know core 2
    assert numa_nodes(tmp_path) == [[0, 1, 2]]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the OS pins no processes")
def test_pin() -> None:
    before = os.sched_getaffinity(0)
    try:
        pin([min(before)])
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        pin(list(before))


def test_this_machine() -> None:
    found = [core for node in numa_nodes() for core in node]
    assert len(found) == len(set(found)) >= 1
