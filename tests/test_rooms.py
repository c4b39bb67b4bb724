"""Imports run only downwards through the rooms, and the lower rooms stay free of heavy things."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import quire

ROOT = Path(quire.__file__).parent
LEVELS = [
    {"cli"},
    {"jobs", "bench"},
    {"fleet"},
    {"api"},
    {"engine"},
    {"schedule", "models", "decode"},
    {"attention", "weights"},
    {"kv"},
    {"kernels"},
    {"errors"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        if name.startswith("quire."):
            other = name.split(".")[1]
            assert other == room or LEVEL[other] > LEVEL[room], f"{room} imports {name}"


@pytest.mark.parametrize(
    ("room", "banned"),
    [
        ("schedule", {"torch"}),
        ("attention", {"typer", "sqlite3"}),
        ("kv", {"typer", "sqlite3"}),
        ("engine", {"typer", "sqlite3", "http", "csv", "json"}),
        ("models", {"transformers"}),
    ],
)
def test_rooms_do_not_know_what_is_not_theirs(room: str, banned: set[str]) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & banned, path


def test_planning_needs_no_tensor_library() -> None:
    for name in ("kv/pages.py", "kv/tree.py", "attention/segments.py", "engine/world.py"):
        assert "torch" not in {n.split(".")[0] for n in imported(ROOT / name)}


def test_every_room_says_what_it_is() -> None:
    for room in LEVEL.keys() - {"errors"}:
        text = (ROOT / room / "README.md").read_text(encoding="utf-8")
        assert 3 <= len(text.splitlines()) <= 30
