"""The native extension: whether it is there, and which of its kernels run.

The other files of this room have the kernels as functions of tensors. All of them need contiguous
rows of float32 or bfloat16 on the CPU (see `fits`) and check shapes before they pass addresses on.
What each computes is defined by the plain PyTorch code beside its caller; tests compare the two for
every instruction set.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from quire.errors import InvalidRequestError

_DTYPES = (torch.float32, torch.bfloat16)


def _load() -> tuple[ModuleType | None, str]:
    try:
        from quire.kernels import _native
    except ImportError as error:
        return None, str(error)
    return _native, ""


_extension, missing_because = _load()
best = "plain" if _extension is None else str(_extension.active())
_chosen = best


def available() -> list[str]:
    """What `use` accepts: "plain", then the instruction sets that run here, plainest first."""
    return ["plain", *([] if _extension is None else _extension.available())]


def active() -> str:
    """The kernels in use: an instruction set, or "plain" for PyTorch alone."""
    return _chosen


def use(name: str) -> str:
    """Choose the kernels of the whole process; returns the former choice. Raises ValueError."""
    global _chosen
    if name not in available():
        raise ValueError(f"No kernels for {name!r} here; there are {', '.join(available())}.")
    before = _chosen
    if name != "plain":
        extension().use(name)
    _chosen = name
    return before


def configure(*, plain: bool = False) -> None:
    """Take the best kernels, or those that QUIRE_KERNELS names, and as many threads as PyTorch.

    ``plain``: PyTorch alone. For the whole process. Raises InvalidRequestError.
    """
    asked = "plain" if plain else os.environ.get("QUIRE_KERNELS", best)
    if asked not in available():
        raise InvalidRequestError(
            f"QUIRE_KERNELS is {asked!r}.",
            field="QUIRE_KERNELS",
            value=asked,
            limit=available(),
            action=f"On this machine it can be {', '.join(available())}.",
        )
    use(asked)
    if _extension is not None:
        _extension.set_threads(torch.get_num_threads())


def warn_if_missing() -> None:
    """Say once that the extension was not built and what that costs."""
    if _extension is None:
        warnings.warn(
            "Quire's native kernels are not installed; PyTorch alone runs, several times slower. "
            "Install a C++20 compiler and reinstall quire (quire info tells more).",
            stacklevel=2,
        )


def fits(x: Tensor) -> bool:
    """Whether native kernels can take ``x``: they are in use, on the CPU, float32 or bfloat16."""
    return _chosen != "plain" and x.device.type == "cpu" and x.dtype in _DTYPES


def extension() -> ModuleType:
    """The extension itself, which must be there: its functions take addresses and check nothing."""
    assert _extension is not None, missing_because
    return _extension


def is_bf16(x: Tensor) -> bool:
    """What kernels are told of ``x``, which is bfloat16 or float32."""
    return x.dtype == torch.bfloat16


def address(x: Tensor | None) -> int:
    """Where the numbers of ``x`` start; 0 for None."""
    return 0 if x is None else x.data_ptr()
