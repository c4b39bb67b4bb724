"""KV of prefixes in files: it outlives the RAM limit, and runs of the same model and recipe.

A *piece* is the exact KV of tokens ``[start, stop)`` after certain others, one file each. Its name
is a digest of all tokens up to ``stop`` and of ``start``, so a piece is found without an index, by
any process that shares the folder. Files are read past the system's cache where the file system
lets them (``O_DIRECT``), by threads, ahead of use; they are written by a thread, whole or not at
all, and the least recently used go when the folder is full. A file that is not what its name says
(cut short, changed, foreign) is deleted and counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
import time
import warnings
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.errors import InvalidRequestError

MAGIC = b"quirekv1"
BLOCK = 4096  # what O_DIRECT reads is aligned to
READERS = 2
AHEAD = 256 << 20  # bytes read before somebody asks for them
BEHIND = 256 << 20  # bytes waiting to be written; more are not kept
ABANDONED = 3600  # seconds after which nobody writes a draft any more
ROOM = 0.9  # of the limit that is left when old files have gone


@dataclass(frozen=True)
class Layout:
    """What a piece's numbers are: ``[2, layers, tokens, kv_heads, head_dim]``, keys first."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Of a piece of ``tokens``."""
        return (2, self.layers, tokens, self.kv_heads, self.head_dim)

    def nbytes(self, tokens: int) -> int:
        """Of the numbers of ``tokens``."""
        return 2 * self.layers * tokens * self.kv_heads * self.head_dim * self.dtype.itemsize


def piece_name(tokens: NDArray[np.int32], start: int) -> str:
    """The name of the piece ``[start, len(tokens))`` of a text that begins with ``tokens``."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=16)
    digest.update(start.to_bytes(8, "little"))
    return digest.hexdigest()


@dataclass
class PrefixFiles:
    """The pieces of one ``key`` (model, weights, recipe) in ``folder``, which other keys share.

    ``limit``: bytes of all files in the folder. Raises InvalidRequestError where nothing can be
    written into the folder.
    """

    folder: Path
    key: str
    layout: Layout
    limit: int
    damaged: int = 0  # files that were not what their names say
    dropped: int = 0  # pieces that were not kept, since the disk was too slow or full
    _total: int = 0
    _behind: int = 0
    _ahead: dict[str, Future[Tensor | None]] = field(default_factory=dict)
    _broken: bool = False

    def __post_init__(self) -> None:
        self.home = self.folder / self.key
        self._own = f".{secrets.token_hex(8)}.draft"  # process ids are the same in two containers
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            probe = self.home / self._own
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InvalidRequestError(
                f"KV cannot be kept in {self.folder}: {error.strerror}.",
                field="kv_dir",
                value=str(self.folder),
                action="Give a folder that can be written.",
            ) from error
        for path in self.folder.glob("*/*.draft"):  # of whoever was killed while writing
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        self._total = sum(size for _, size, _ in _files(self.folder))
        self._readers = ThreadPoolExecutor(READERS, "kv-read")
        self._writer = ThreadPoolExecutor(1, "kv-write")

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self._path(name).exists()

    def ahead(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Begin to read the pieces ``(name, tokens)``, the next ones first; forget all others."""
        names: dict[str, None] = {}
        size = 0
        for name, tokens in wanted:
            size += self.layout.nbytes(tokens)
            if size > AHEAD:
                break
            names[name] = None
        for name in self._ahead.keys() - names.keys():
            self._ahead.pop(name).cancel()
        for name in names:
            if name not in self._ahead:
                self._ahead[name] = self._readers.submit(self._read, name)

    def read(self, name: str, tokens: int) -> Tensor | None:
        """The numbers of a piece of ``tokens``, see `Layout`; None where there are none."""
        future = self._ahead.pop(name, None)
        found = future.result() if future is not None else self._read(name)
        if found is not None and found.shape[2] != tokens:
            self._delete(name)
            return None
        return found

    def write(self, name: str, numbers: Tensor) -> None:
        """Keep a piece; returns at once. Nothing fails here: what cannot be kept is dropped."""
        if self._broken or self._behind + numbers.nbytes > BEHIND:
            self.dropped += 1
            return
        self._behind += numbers.nbytes
        self._writer.submit(self._write, name, numbers)

    def close(self) -> None:
        """Wait until everything is written, and warn of what did not go well."""
        self._readers.shutdown(cancel_futures=True)
        self._writer.shutdown()
        if self.damaged:
            warnings.warn(
                f"{self.damaged} KV files in {self.home} were damaged; what they should have held "
                "was computed again.",
                stacklevel=2,
            )
        if self.dropped:
            warnings.warn(
                f"{self.dropped} pieces of KV were not kept in {self.home}, since the disk was too "
                "slow or full.",
                stacklevel=2,
            )

    def _path(self, name: str) -> Path:
        return self.home / f"{name}.kv"

    def _read(self, name: str) -> Tensor | None:
        path = self._path(name)
        try:
            content = _contents(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            warnings.warn(f"{path} cannot be read: {error}", stacklevel=2)
            return None
        with suppress(ValueError, KeyError, TypeError):
            found = self._numbers(name, content)
            with suppress(OSError):
                os.utime(path)  # used now
            return found
        self._delete(name)
        return None

    def _numbers(self, name: str, content: memoryview) -> Tensor:
        """What a file holds. Raises ValueError or the like where it is damaged."""
        if bytes(content[: len(MAGIC)]) != MAGIC:
            raise ValueError("not a piece")
        tokens = int(json.loads(bytes(content[16:BLOCK]))["tokens"])
        numbers = content[BLOCK : BLOCK + self.layout.nbytes(tokens)]
        whole = len(numbers) == self.layout.nbytes(tokens)
        if not whole or content[:BLOCK] != self._head(name, tokens, zlib.crc32(numbers)):
            raise ValueError("other numbers")
        flat = torch.frombuffer(numbers, dtype=self.layout.dtype)
        return flat.view(self.layout.shape(tokens))

    def _head(self, name: str, tokens: int, checksum: int) -> bytes:
        """A file's first block."""
        shape = [self.layout.layers, self.layout.kv_heads, self.layout.head_dim]
        header = json.dumps(
            {
                "key": self.key,
                "name": name,
                "shape": shape,
                "dtype": str(self.layout.dtype),
                "tokens": tokens,
                "checksum": checksum,
            }
        ).encode()
        return (MAGIC + len(header).to_bytes(8, "little") + header).ljust(BLOCK)

    def _write(self, name: str, numbers: Tensor) -> None:
        path = self._path(name)
        draft = path.with_suffix(self._own)
        data = memoryview(numbers.contiguous().view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
        try:
            with draft.open("wb") as stream:
                stream.write(self._head(name, numbers.shape[2], zlib.crc32(data)))
                stream.write(data)
                stream.write(bytes(-len(data) % BLOCK))
            draft.replace(path)
            self._total += path.stat().st_size
            if self._total > self.limit:
                self._make_room()
        except OSError as error:
            self._broken = True
            self.dropped += 1
            draft.unlink(missing_ok=True)
            warnings.warn(f"KV is not kept in {self.folder} any more: {error}", stacklevel=2)
        finally:
            self._behind -= numbers.nbytes

    def _make_room(self) -> None:
        """Delete the least recently used files, of any key, until there is room."""
        files = sorted(_files(self.folder))
        self._total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._total <= ROOM * self.limit:
                break
            Path(path).unlink(missing_ok=True)
            self._total -= size

    def _delete(self, name: str) -> None:
        self.damaged += 1
        self._path(name).unlink(missing_ok=True)


def _files(folder: Path) -> Iterable[tuple[float, int, str]]:
    """All pieces in a folder: last use, size, path. Those that vanish meanwhile are left out."""
    for path in folder.glob("*/*.kv"):
        with suppress(OSError):
            stat = path.stat()
            yield stat.st_mtime, stat.st_size, str(path)


def _contents(path: Path) -> memoryview:
    """A whole file, read past the system's cache where that is possible."""
    flags = os.O_RDONLY | os.O_NONBLOCK  # a pipe of that name would wait for a writer
    try:
        file = os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except FileNotFoundError:
        raise
    except OSError:  # a file system without direct reads
        file = os.open(path, flags)
    try:
        size = os.fstat(file).st_size
        if size < BLOCK:
            return memoryview(bytes(BLOCK))
        content = memoryview(mmap.mmap(-1, -(-size // BLOCK) * BLOCK))  # aligned
        done = 0
        while done < size:
            count = os.preadv(file, [content[done:]], done)
            if count == 0 or (done + count) % BLOCK:
                break  # cut short
            done += count
        return content
    finally:
        os.close(file)
