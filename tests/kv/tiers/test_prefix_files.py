"""KV in files: what is written is read again, and what is damaged is not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.kv.tiers import prefixes
from quire.kv.tiers.prefixes import BLOCK, Layout, PrefixFiles, piece_name

LAYOUT = Layout(3, 2, 16, torch.bfloat16)
NAME = piece_name(np.arange(40, dtype=np.int32), 8)


def numbers(tokens: int, layout: Layout = LAYOUT) -> torch.Tensor:
    return torch.randn(layout.shape(tokens)).to(layout.dtype)


def files(folder: Path, key: str = "k", limit: int = 1 << 30) -> PrefixFiles:
    return PrefixFiles(folder, key, LAYOUT, limit)


@pytest.fixture
def piece(tmp_path: Path) -> Path:
    """The file of one piece of 32 tokens."""
    made = files(tmp_path)
    made.write(NAME, numbers(32))
    made.close()
    return tmp_path / "k" / f"{NAME}.kv"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 255, 256])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype, tokens: int) -> None:
    layout = Layout(2, 3, 20, dtype)
    content = numbers(tokens, layout).transpose(1, 0).contiguous().transpose(1, 0)  # not contiguous
    first = PrefixFiles(tmp_path, "k", layout, 1 << 30)
    assert not first.has(NAME)
    assert first.read(NAME, tokens) is None
    first.write(NAME, content)
    first.close()
    second = PrefixFiles(tmp_path, "k", layout, 1 << 30)
    for ahead in (False, True):
        if ahead:
            second.ahead([(NAME, tokens), ("0" * 32, tokens)])
        found = second.read(NAME, tokens)
        assert found is not None
        assert torch.equal(found, content)
    assert second.damaged == second.dropped == 0
    assert not list(tmp_path.glob("*/.*"))  # no drafts are left


@pytest.mark.usefixtures("piece")
def test_other_keys_see_nothing(tmp_path: Path) -> None:
    assert files(tmp_path, "k").has(NAME)
    assert not files(tmp_path, "other").has(NAME)


def test_abandoned_drafts_go(piece: Path) -> None:
    """A killed process leaves its draft; one that is being written stays."""
    old, new = piece.with_suffix(".1.draft"), piece.with_suffix(".2.draft")
    for path in (old, new):
        path.write_bytes(b"half a piece")
    os.utime(old, (0, 0))
    made = files(piece.parents[1])
    assert not old.exists()
    assert new.exists()
    assert made.has(NAME)


def test_two_writers_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or of one process id, in two containers: neither takes the other's draft away."""
    first, second = files(tmp_path), files(tmp_path)
    drafts = []
    replace = Path.replace

    def late(draft: Path, path: Path) -> Path:
        drafts.append(draft)
        if len(drafts) == 1:
            second._write(NAME, numbers(32))
        return replace(draft, path)

    monkeypatch.setattr(Path, "replace", late)
    first._write(NAME, numbers(32))
    assert len(set(drafts)) == 2
    assert first.dropped == second.dropped == 0
    assert files(tmp_path).read(NAME, 32) is not None


def test_a_pipe_of_that_name_is_no_piece(piece: Path) -> None:
    piece.unlink()
    os.mkfifo(piece)
    made = files(piece.parents[1])
    assert made.read(NAME, 32) is None
    assert not piece.exists()
    assert made.damaged == 1


def test_every_bit_of_the_header_counts(piece: Path) -> None:
    whole = piece.read_bytes()
    for bit in range(8 * len(whole[:BLOCK].rstrip())):
        byte = whole[bit // 8] ^ (1 << bit % 8)
        piece.write_bytes(whole[: bit // 8] + bytes([byte]) + whole[bit // 8 + 1 :])
        assert files(piece.parents[1]).read(NAME, 32) is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damage")
    made = files(folder)
    made.write(NAME, numbers(32))
    made.close()
    path = folder / "k" / f"{NAME}.kv"
    whole = path.read_bytes()
    used = BLOCK + LAYOUT.nbytes(32)
    kind = data.draw(st.sampled_from(["flip", "cut", "empty", "foreign"]))
    if kind == "flip":
        header = len(whole[:BLOCK].rstrip())
        at = data.draw(st.integers(0, used - 1).filter(lambda i: i < header or i >= BLOCK))
        byte = whole[at] ^ (1 << data.draw(st.integers(0, 7)))
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
    elif kind == "cut":
        path.write_bytes(whole[: data.draw(st.integers(1, used - 1))])
    else:
        path.write_bytes(b"" if kind == "empty" else os.urandom(len(whole)))
    again = files(folder)
    assert again.read(NAME, 32) is None
    assert again.damaged == 1
    assert not path.exists()
    with pytest.warns(UserWarning, match="1 KV files in .* were damaged"):
        again.close()


def test_a_piece_of_another_name_or_length(piece: Path, tmp_path: Path) -> None:
    other = piece_name(np.arange(41, dtype=np.int32), 8)
    (piece.parent / f"{other}.kv").write_bytes(piece.read_bytes())
    made = files(tmp_path)
    assert made.read(other, 32) is None
    assert made.read(NAME, 31) is None
    assert made.damaged == 2


def test_names_tell_texts_and_starts_apart() -> None:
    tokens = np.arange(100, dtype=np.int32)
    names = {piece_name(tokens[:stop], start) for stop in range(1, 101) for start in range(stop)}
    assert len(names) == 100 * 101 // 2
    changed = tokens.copy()
    changed[0] = 7
    assert piece_name(changed, 50) != piece_name(tokens, 50)
    assert piece_name(tokens[::1], 3) == piece_name(np.arange(100, dtype=np.int32), 3)


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    size = -(-LAYOUT.nbytes(64) // BLOCK) * BLOCK + BLOCK
    made = files(tmp_path, limit=10 * size)
    names = [piece_name(np.arange(i + 1, dtype=np.int32), 0) for i in range(11)]
    now = time.time()
    for i, name in enumerate(names[:10]):
        made.write(name, numbers(64))
        made._writer.submit(lambda: None).result()  # until it is there
        os.utime(tmp_path / "k" / f"{name}.kv", (now - 1000 + i, now - 1000 + i))
    assert made.read(names[0], 64) is not None  # used again: not the oldest any more
    made.write(names[10], numbers(64))
    made.close()
    left = [name for name in names if made.has(name)]
    assert left == [names[0], *names[3:]]
    assert sum(p.stat().st_size for p in tmp_path.glob("*/*.kv")) <= 10 * size


def test_other_keys_give_way_too(tmp_path: Path) -> None:
    size = -(-LAYOUT.nbytes(64) // BLOCK) * BLOCK + BLOCK
    for key in ("a", "b"):
        made = files(tmp_path, key, limit=3 * size)
        for i in range(3):
            made.write(piece_name(np.arange(i + 1, dtype=np.int32), 0), numbers(64))
        made.close()
    assert len(list(tmp_path.glob("a/*.kv"))) + len(list(tmp_path.glob("b/*.kv"))) <= 3


def test_what_cannot_be_written_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = files(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    made._writer.submit(time.sleep, 0.1)  # let the warning come while it is waited for
    made.write(NAME, numbers(8))
    with pytest.warns(UserWarning, match=r"not kept in .* any more.*No space"):
        made._writer.submit(lambda: None).result()
    made.write(NAME, numbers(8))
    assert made.dropped == 2
    assert not list((tmp_path / "k").iterdir())


def test_a_slow_disk_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "BEHIND", LAYOUT.nbytes(40))
    made = files(tmp_path)
    made._writer.submit(time.sleep, 0.2)
    for i in range(3):
        made.write(piece_name(np.arange(i + 1, dtype=np.int32), 0), numbers(16))
    with pytest.warns(UserWarning, match="1 pieces of KV were not kept"):
        made.close()
    assert made.dropped == 1
    assert len(list(tmp_path.glob("*/*.kv"))) == 2


@pytest.mark.usefixtures("piece")
def test_reading_ahead_is_bounded_and_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "AHEAD", LAYOUT.nbytes(70))
    made = files(tmp_path)
    made.ahead([(NAME, 32), ("a", 32), ("b", 32)])
    assert set(made._ahead) == {NAME, "a"}
    made.ahead([("b", 32)])
    assert set(made._ahead) == {"b"}
    assert made.read(NAME, 32) is not None


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match=r"KV cannot be kept in .*file") as caught:
        files(tmp_path / "file")
    assert caught.value.field == "kv_dir"
