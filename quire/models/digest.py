"""What a checkpoint is, in a few letters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_END_BYTES = 1 << 20
_SMALL = (".json", ".jinja")
_WEIGHTS = (".safetensors", ".gguf")


def model_digest(folder: Path) -> str:
    """A digest of a checkpoint: small files as a whole, of weights the size, beginning and end."""
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    parts: list[bytes] = []
    for file in files:
        if file.suffix in _SMALL:
            parts += [file.name.encode(), file.read_bytes()]
        elif file.suffix in _WEIGHTS:
            parts += [file.name.encode(), *_ends(file)]
    return digest(parts)


def _ends(file: Path) -> list[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(_END_BYTES)
        stream.seek(max(0, size - _END_BYTES))
        return [str(size).encode(), first, stream.read(_END_BYTES)]


def digest(parts: Iterable[bytes]) -> str:
    """A short digest of ``parts``, wherever they begin and end."""
    total = hashlib.blake2b(digest_size=8)
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()
