"""``quire info``: what this machine offers and which kernels run, and why; a model's sizes."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from typing import Annotated

import psutil
import torch
import typer

from quire.api.setup import Setup
from quire.attention import native as attention
from quire.engine.budget import format_bytes
from quire.errors import QuireError
from quire.kernels import native
from quire.models.loader import weight_bytes


def info(
    model: Annotated[
        str | None, typer.Option(help="Also say how this checkpoint would be held.")
    ] = None,
) -> None:
    """Say which kernels are live and why, and what a model would take."""
    try:
        native.configure()
        for name, value in machine():
            print(f"{name:<12}{value}")
        if model is not None:
            for name, value in _model(Setup.make(model)):
                print(f"{name:<12}{value}")
    except QuireError as error:
        print(f"quire: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def machine() -> list[tuple[str, str]]:
    """What is installed and what the machine has, as names and texts."""
    memory = psutil.virtual_memory()
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        ("quire", version("quire")),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("cpu", f"{platform.machine()}, {psutil.cpu_count()} cores"),
        ("memory", f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free"),
        ("cuda", cuda),
        ("kernels", _kernels()),
    ]


def _kernels() -> str:
    names = native.available()
    if native.missing_because:
        return (
            f"plain PyTorch: the native extension is not installed ({native.missing_because}). "
            "Install a C++20 compiler and reinstall quire."
        )
    return f"{native.active()}, of {', '.join(names)} that run here (QUIRE_KERNELS chooses)"


def _model(setup: Setup) -> list[tuple[str, str]]:
    spec = setup.spec
    like = torch.empty(0, dtype=setup.dtype)
    reason = ""
    if not native.fits(like):
        reason = f": the kernels take float32 and bfloat16, not {setup.dtype}"
    elif not attention.fits(like, spec.head_dim):
        reason = f": heads of {spec.head_dim} are not a multiple of 16 up to 256"
    return [
        ("model", f"{spec.architecture}, {len(spec.layers)} layers, {setup.dtype}"),
        ("weights", format_bytes(weight_bytes(setup.folder, setup.dtype))),
        ("KV", f"{setup.budget.kv_token} bytes a token"),
        ("attention", f"PyTorch{reason}" if reason else f"native, {native.active()}"),
    ]
