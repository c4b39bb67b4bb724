"""The portable kernels on ARM64: they build and compute the same, under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "quire" / "kernels" / "csrc"
FILES = tuple(file.stem for file in SOURCE.glob("*.cpp") if file.stem != "module")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"{COMPILER} or {EMULATOR} is not installed",
)
def test_portable_kernels_on_arm(tmp_path: Path) -> None:
    program = tmp_path / "smoke"
    flags = ["-std=c++20", "-O1", "-Wno-psabi", "-DQUIRE_ISA=portable", "-static", "-pthread"]
    files = [str(SOURCE / f"{name}.cpp") for name in FILES]
    smoke = str(Path(__file__).with_name("smoke.cpp"))
    subprocess.run([COMPILER, *flags, f"-I{SOURCE}", smoke, *files, "-o", str(program)], check=True)
    done = subprocess.run([EMULATOR, str(program)], check=True, capture_output=True, text=True)
    errors = [float(error) for error in done.stdout.split()]
    assert len(errors) == 3
    assert max(errors) < 1e-5
