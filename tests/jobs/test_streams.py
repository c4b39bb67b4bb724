from __future__ import annotations

import gzip
import io
import zlib

import pytest
from files import zst
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.jobs.streams import kind_by_name, recognise

TEXT = b"".join(b'{"n": %d, "t": "%x"}\n' % (i, i * 7919 % 65521) for i in range(10_000))


def unpack(data: bytes) -> tuple[bytes, bool]:
    """What can be read, and whether an error came after it."""
    found = io.BytesIO()
    try:
        _, stream = recognise("a.jsonl", io.BufferedReader(io.BytesIO(data)))
        while block := stream.read1(1 << 16):
            found.write(block)
    except OSError:
        return found.getvalue(), True
    return found.getvalue(), False


def in_gzip(data: bytes) -> bytes:
    """All that the decoder can give, byte by byte."""
    decoder = zlib.decompressobj(wbits=31)
    found = io.BytesIO()
    for at in range(len(data)):
        try:
            found.write(decoder.decompress(data[at : at + 1]))
        except zlib.error:
            break
    return found.getvalue()


@pytest.mark.parametrize("data", [b"", b"x", TEXT, TEXT * 40], ids=len)
@pytest.mark.parametrize("pack", [gzip.compress, zst])
def test_round_trip(pack: object, data: bytes) -> None:
    assert unpack(pack(data)) == (data, False)  # type: ignore[operator]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.0001, 0.9999), flip=st.booleans())
def test_gzip_gives_all_bytes_before_the_damage(share: float, flip: bool) -> None:
    data = bytearray(gzip.compress(TEXT))
    at = max(10, int(len(data) * share))
    if flip:
        data[at] ^= 0x10
    else:
        del data[at:]
    found, failed = unpack(bytes(data))
    assert found == in_gzip(bytes(data))
    assert failed or found == TEXT  # a flipped bit of the header changes nothing


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.001, 0.9999))
def test_zstd_gives_all_bytes_before_the_end(share: float) -> None:
    data = zst(TEXT)
    found, failed = unpack(data[: max(5, int(len(data) * share))])
    assert failed
    assert TEXT.startswith(found)
    assert len(found) >= len(TEXT) * share - (1 << 18)  # a block of 128 KiB may be unfinished


def test_names() -> None:
    assert kind_by_name("x/data.JSONL.GZ") == ("jsonl", "gzip")
    assert kind_by_name("data.csv.zst") == ("csv", "zstd")
    assert kind_by_name("data.gz") == (None, "gzip")
    assert kind_by_name("-") == (None, None)
    assert kind_by_name("data.feather") == ("arrow", None)
