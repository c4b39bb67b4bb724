"""Tensors on disk: the same numbers, no RAM, no file left."""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.errors import InvalidRequestError, MemoryBudgetError
from quire.kv.tiers.mapped import check_folder, is_on_disk, on_disk, read_ahead

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at the system's page cache")


def cached(x: Tensor) -> list[bool]:
    """Of each page of memory behind ``x``, whether it is in RAM."""
    start = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = x.data_ptr() + x.nbytes - start
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found) == 0
    return [bool(page & 1) for page in found]


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("quire-kv-")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (), (3, 1000, 7), (0, 5), (2, 4096)])
def test_the_same_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 200, shape).to(dtype)
    y = on_disk(x)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert torch.equal(x, y)
    assert is_on_disk(y) == bool(x.numel())
    assert not is_on_disk(x)
    read_ahead(y)


def test_parts_and_copies() -> None:
    x = torch.randn(4, 50, 8)
    y = on_disk(x.transpose(0, 1))  # any strides
    assert y.is_contiguous()
    assert torch.equal(y, x.transpose(0, 1))
    assert is_on_disk(y[3:7, 1])
    assert not is_on_disk(y[torch.tensor([1, 2])])
    assert not is_on_disk(y.float() + 1)


def test_no_file_is_left(tmp_path: Path) -> None:
    x = on_disk(torch.ones(10000), str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert x.sum() == 10000


@linux
def test_the_bytes_go_with_the_last_tensor() -> None:
    before = mappings()
    x = on_disk(torch.ones(10000))
    part = x[10:20]
    del x
    gc.collect()
    assert mappings() == before + 1
    assert part.sum() == 10
    del part
    gc.collect()
    assert mappings() == before


def dropped(x: Tensor) -> Tensor:
    found = on_disk(x)
    if any(cached(found)):
        pytest.skip("the temporary folder is in RAM, or its pages cannot be dropped")
    return found


@linux
def test_takes_no_ram_until_it_is_read_ahead() -> None:
    x = dropped(torch.randn(8, 64, 1024))
    read_ahead(x[3])
    pages = 64 * 1024 * 4 // mmap.PAGESIZE
    wait_for(x[3])
    found = cached(x)
    assert all(found[3 * pages : 4 * pages])
    assert not any(found[6 * pages :])


@linux
@pytest.mark.parametrize("width", [32, 1024, 1500])  # numbers: parts of a page, pages, in between
def test_reads_ahead_what_is_asked(width: int) -> None:
    x = dropped(torch.randn(800000 // width, width))
    rows = torch.tensor([[5, 2], [len(x) - 1, 5]])
    read_ahead(x, rows)
    for row in rows.flatten().tolist():
        wait_for(x[row])
    assert sum(cached(x)) < len(cached(x)) / 2


@linux
def test_reads_ahead_parts_that_lie_apart() -> None:
    x = dropped(torch.randn(4, 128, 1024))
    part = x[1:3, :16]
    read_ahead(part)
    for one in part:
        wait_for(one)
    assert not any(cached(x[3]))


def wait_for(x: Tensor) -> None:
    for _ in range(200):
        if all(cached(x)):
            return
        time.sleep(0.01)
    raise AssertionError("not read ahead")


def test_nothing_to_read_ahead() -> None:
    read_ahead(torch.randn(10), torch.tensor([3]))
    read_ahead(on_disk(torch.randn(10, 10)), torch.zeros(0, dtype=torch.int64))


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    check_folder(None)
    check_folder(str(tmp_path))
    missing = str(tmp_path / "missing")
    for use in (check_folder, lambda folder: on_disk(torch.ones(3), folder)):
        with pytest.raises(InvalidRequestError, match=r"missing.*Give a folder"):
            use(missing)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequestError, match="no such folder"):
        check_folder(str(tmp_path / "file"))


def test_a_full_folder(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(MemoryBudgetError, match=r"no room for 400,000 more bytes"):
            on_disk(torch.ones(100_000), str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
