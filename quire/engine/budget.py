"""Where the memory goes, worked out before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from quire.engine.limits import PAGE_TOKENS
from quire.errors import InvalidRequestError, MemoryBudgetError
from quire.models.spec import ModelSpec

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
SHARE_OF_AVAILABLE = 0.85  # asked for when the user names no limit
HEADROOM = 192 << 20  # allocator, tokenizer, rows in flight
MINIMUM_KV_TOKENS = 256


def parse_bytes(text: str | int) -> int:
    """``"6GiB"``, ``"500MB"``, ``"1.5g"`` or a number of bytes, as bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", str(text), re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise InvalidRequestError(
            f"{text!r} is not a size.", value=text, action="Write it like 6GiB or 500MB."
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(count: float) -> str:
    """Bytes in the binary unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


@dataclass(frozen=True)
class Budget:
    """Bytes: ``asked`` in total; ``kv`` is what the other parts leave of it."""

    asked: int
    available: int
    weights: int
    workspace: int
    reserve: int
    kv: int
    kv_token: int

    def parts(self) -> list[tuple[str, int, str]]:
        """Name, bytes and note of every share, and last of their sum."""
        return [
            ("weights", self.weights, ""),
            ("workspace", self.workspace, "activations and logits of one step"),
            ("reserve", self.reserve, "Python, libraries, rows in flight"),
            ("KV cache", self.kv, f"{self.kv // self.kv_token:,} tokens"),
            ("asked", self.asked, f"{format_bytes(self.available)} available"),
        ]

    def table(self) -> str:
        """The budget as lines of text."""
        lines = [f"  {n:<10}{format_bytes(b):>12}  {note}".rstrip() for n, b, note in self.parts()]
        return "\n".join(lines)


def workspace_bytes(spec: ModelSpec, chunk: int, dtype: torch.dtype) -> int:
    """Upper estimate of a step's activations for ``chunk`` tokens, in bytes."""
    heads = spec.heads * spec.head_dim
    kept = 4 * spec.hidden_size + 3 * spec.intermediate_size + 4 * heads
    partials = 6 * heads  # attention levels in the merge
    tiles = (64 << 20) * 3 + (32 << 20) * 3  # logits and score tiles with their copies
    return chunk * ((kept + partials) * max(4, dtype.itemsize)) + tiles


def divide_memory(memory: str | int | None, workers: int) -> int:
    """Bytes for each of ``workers`` processes on this machine, this process set aside.

    ``memory`` bounds them all together; None: most of what is available. Raises MemoryBudgetError
    where that is more than the machine has.
    """
    resident = psutil.Process().memory_info().rss
    available = psutil.virtual_memory().available + resident
    asked = int(available * SHARE_OF_AVAILABLE) if memory is None else parse_bytes(memory)
    if asked > available:
        raise MemoryBudgetError(
            f"{format_bytes(asked)} are asked for and {format_bytes(available)} are available.",
            value=asked,
            limit=available,
            action=f"Ask for at most --memory {available // 2**20}MiB.",
        )
    return max(0, int(asked - resident)) // workers


def make_budget(
    spec: ModelSpec,
    weights: int,
    *,
    dtype: torch.dtype,
    chunk: int,
    kv_token: int,
    memory: int | None,
    kv_memory: int | None,
    device: str = "cpu",
) -> Budget:
    """Share out the memory. Raises MemoryBudgetError with one suggestion if it cannot fit.

    ``memory`` bounds the total (None: most of what is available); ``kv_memory`` sets the KV alone.
    On a CUDA device the weights, workspace and KV are counted against the device's memory.
    """
    if device.startswith("cuda"):
        available, reserve = torch.cuda.mem_get_info(device)[0], HEADROOM
    else:
        resident = psutil.Process().memory_info().rss
        available = psutil.virtual_memory().available + resident
        reserve = resident + HEADROOM
    workspace = workspace_bytes(spec, chunk, dtype)
    fixed = weights + workspace + reserve
    asked = memory if memory is not None else int(available * SHARE_OF_AVAILABLE)
    if kv_memory is not None and memory is None:
        asked = fixed + kv_memory
    kv = min(asked - fixed, kv_memory) if kv_memory is not None else asked - fixed
    budget = Budget(asked, available, weights, workspace, reserve, kv, kv_token)
    least = fixed + MINIMUM_KV_TOKENS * kv_token
    if asked > available:
        raise MemoryBudgetError(
            f"{format_bytes(asked)} are asked for and {format_bytes(available)} are available.\n"
            f"{budget.table()}\n",
            value=asked,
            limit=available,
            action=f"Ask for at most --memory {available // 2**20}MiB."
            if least <= available
            else f"This model needs {format_bytes(least)}: use a smaller one or another machine.",
        )
    if kv_memory is None and asked < least:
        raise MemoryBudgetError(
            f"{format_bytes(asked)} leave no room for KV.\n{budget.table()}\n",
            value=asked,
            limit=least,
            action=f"Ask for at least --memory {-(-least // 2**20)}MiB.",
        )
    if kv < PAGE_TOKENS * kv_token:
        raise MemoryBudgetError(
            f"{format_bytes(kv)} of KV hold no page of {PAGE_TOKENS} tokens.",
            value=kv,
            limit=PAGE_TOKENS * kv_token,
            action=f"Give at least {format_bytes(MINIMUM_KV_TOKENS * kv_token)} of KV.",
        )
    return budget
