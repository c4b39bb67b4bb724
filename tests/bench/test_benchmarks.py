"""The benchmarks of kernels and memory run, at sizes that measure nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention", "--readers 2 --prefix 40"),
        ("fused", "--shape tiny --rows 1 3 --context 20 --seconds 0.1 --folder here"),
        ("kv_decode", "--shape 135m --whole no --batch 1 --tokens 4200 --repeats 1"),
        ("kv_dir", "--shape tiny --documents 2 --tokens 300 --repeats 1 --folder here"),
    ],
)
def test_small_sizes(name: str, options: str, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / f"{name}.py", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
