"""The docs are true: their tables are generated, their commands run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BINARY = Path(sys.executable).parent


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL):
            found.append((page.name, text))
    return found


# Each block's commands, which may build on each other.
COMMANDS = [
    (
        page,
        [
            line.removeprefix("$ ").split("#")[0].replace(".venv/bin/", "")
            for line in text.splitlines()
            if line.startswith("$ ")
        ],
    )
    for page, text in blocks("console")
]
MAKE = [(page, c) for page, block in COMMANDS for c in block if c.startswith("make")]
RUN = [(page, [c for c in block if not c.startswith("make")]) for page, block in COMMANDS]
RUN = [(page, block) for page, block in RUN if block]


def test_generated_parts_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("page", "command"), MAKE)
def test_make_targets_exist(page: str, command: str) -> None:  # noqa: ARG001
    target = command.split()[1]
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("page", "commands"), RUN)
def test_commands_run(page: str, commands: list[str], tmp_path: Path) -> None:  # noqa: ARG001
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands:
        words = shlex.split(command)
        words[0] = str(BINARY / words[0])
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_examples_run(page: str, code: str, tmp_path: Path) -> None:  # noqa: ARG001
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_pages_link_to_files_that_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
