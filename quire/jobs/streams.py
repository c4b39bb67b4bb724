"""The bytes of an input file: found to be of a kind, and decompressed.

Every stream here hands out all bytes before a damage; only then it raises OSError.
"""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from quire.errors import InputFileError
from quire.jobs.extras import require_pyarrow

Kind = Literal["jsonl", "csv", "parquet", "arrow"]
Packing = Literal["gzip", "zstd"]
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_PACKINGS: dict[str, Packing] = {".gz": "gzip", ".zst": "zstd"}
_MAGIC: dict[bytes, Kind] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # a stream, without the file format's magic
}
_PACKED: dict[bytes, Packing] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or a workbook",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_BLOCK = 1 << 18


def kind_by_name(name: str) -> tuple[Kind | None, Packing | None]:
    """What the suffixes of a file's name tell: ``data.jsonl.gz`` is JSONL in gzip."""
    path = Path(name)
    packing = _PACKINGS.get(path.suffix.lower())
    if packing is not None:
        path = path.with_suffix("")
    return _SUFFIXES.get(path.suffix.lower()), packing


def title(file: str) -> str:
    """How messages call a file."""
    return "standard input" if file == "-" else file


def open_input(file: str) -> io.BufferedReader:
    """The bytes of ``file`` as they are; ``-`` is standard input. Raises OSError."""
    raw = io.FileIO(sys.stdin.fileno(), closefd=False) if file == "-" else io.FileIO(file)
    return io.BufferedReader(raw, _BLOCK)


def recognise(file: str, stream: io.BufferedReader) -> tuple[Kind, io.BufferedReader]:
    """The kind of the file's content, and its bytes after decompression.

    Magic bytes count most, then the name's suffix. Text that neither tells is JSON lines if any
    line of its beginning starts with a brace, else CSV. Raises InputFileError or OSError.
    """
    named, packing = kind_by_name(file)
    packing = _match(_PACKED, stream.peek(8)) or packing
    if packing is not None:
        blocks = _gunzip(stream) if packing == "gzip" else _unzstd(stream)
        stream = io.BufferedReader(_Blocks(blocks), _BLOCK)
    head = stream.peek(_BLOCK)
    foreign = _match(_FOREIGN, head)
    if foreign is not None:
        raise InputFileError(
            f"{title(file)} is {foreign}.",
            value=file,
            action="Give JSONL or CSV in UTF-8, plain, .gz or .zst; Parquet; or Arrow.",
        )
    kind = _match(_MAGIC, head) or named
    if kind is None:
        kind = "csv" if head.strip() and not _has_object(head) else "jsonl"
    if packing is not None and kind == "parquet":
        raise InputFileError(
            f"{title(file)} is Parquet inside {packing}.", value=file, action="Unpack it first."
        )
    return kind, stream


def _match(table: dict[bytes, Any], head: bytes) -> Any:
    return next((value for magic, value in table.items() if head.startswith(magic)), None)


def _has_object(head: bytes) -> bool:
    lines = head.removeprefix(b"\xef\xbb\xbf").splitlines()
    return any(line.lstrip().startswith(b"{") for line in lines)


class _Blocks(io.RawIOBase):
    """An iterator of blocks as a raw stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` with what is at hand; 0 at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _gunzip(stream: BinaryIO) -> Iterator[bytes]:
    """All members of a gzip file."""
    decoder = None  # None before, between and after members
    members = 0
    for block in iter(partial(stream.read, _BLOCK), b""):
        if decoder is None:
            block = block.lstrip(b"\0")  # members may be padded with zeros
        while block:
            if decoder is None:
                decoder = zlib.decompressobj(wbits=31)
                members += 1
            before = decoder.copy()
            try:
                found = decoder.decompress(block, _BLOCK)
            except zlib.error as error:
                yield from _up_to_damage(before, block)
                raise OSError(f"the gzip data is damaged ({error})") from error
            yield found
            if decoder.eof:
                block, decoder = decoder.unused_data.lstrip(b"\0"), None
            else:
                block = decoder.unconsumed_tail
    if decoder is not None or not members:
        raise OSError("the gzip data is cut off")


def _up_to_damage(decoder: Any, block: bytes) -> Iterator[bytes]:
    """What a decoder gives for a block that it fails at."""
    for at in range(len(block)):
        try:
            yield decoder.decompress(block[at : at + 1])
        except zlib.error:
            return


def _unzstd(stream: io.BufferedReader) -> Iterator[bytes]:
    """All frames of a Zstandard file."""
    require_pyarrow("Reading .zst")
    import pyarrow

    if not stream.peek(1):
        raise OSError("the zstd data is cut off")
    source = pyarrow.CompressedInputStream(stream, "zstd")
    given = 0
    try:
        for block in iter(partial(source.read, _BLOCK), b""):
            given += len(block)
            yield block
        return
    except OSError:
        if not stream.seekable():
            raise
    # A failed read swallows what it decoded before the damage: read that again byte by byte.
    stream.seek(0)
    again = pyarrow.CompressedInputStream(stream, "zstd")
    while given:
        given -= len(again.read(min(given, _BLOCK)))
    yield from iter(partial(again.read, 1), b"")
