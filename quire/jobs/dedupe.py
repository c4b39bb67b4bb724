"""Equal rows are computed once: which rows may share an answer, and where to find it."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np

from quire.jobs.rows import Row

SLOTS = 1 << 20
_IDENTITY = {"index", "file", "line", "name", "custom_id"}
_ASKED = tuple(f.name for f in fields(Row) if f.name not in _IDENTITY)


def sharing_key(row: Row) -> bytes | None:
    """A digest, 16 bytes, of all that the answer depends on.

    None where equal rows have different answers: sampled without a seed of their own.
    """
    if not row.params.greedy and row.params.seed is None:
        return None
    text = repr([getattr(row, name) for name in _ASKED])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Seen:
    """The row that had each key last. A direct-mapped table of fixed size.

    A key may push another out of its slot, which costs computing a row again and nothing else.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self._keys = np.zeros(slots, dtype="V16")
        self._rows = np.zeros(slots, dtype=np.int64)  # index + 1; 0 is an empty slot
        self._slots = slots

    def find(self, key: bytes) -> int | None:
        """The index of the row that was noted for ``key``."""
        slot = int.from_bytes(key[:8], "little") % self._slots
        index = int(self._rows[slot])
        return index - 1 if index and self._keys[slot].tobytes() == key else None

    def note(self, key: bytes, index: int) -> None:
        """Row ``index`` has ``key``."""
        slot = int.from_bytes(key[:8], "little") % self._slots
        self._keys[slot] = np.void(key)
        self._rows[slot] = index + 1
