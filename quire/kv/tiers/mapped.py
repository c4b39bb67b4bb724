"""Tensors on disk: memory-mapped, so that they are read like any other and take no RAM.

What has been read stays in the system's page cache while there is room, and goes when something
else needs it. A folder in RAM (tmpfs, as /tmp is on some systems) saves nothing.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile

import numpy as np
import torch
from torch import Tensor

from quire.errors import InvalidRequestError, MemoryBudgetError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def on_disk(x: Tensor, folder: str | None = None) -> Tensor:
    """A copy of ``x``, contiguous, in a file in ``folder`` (None: the system's temporary one).

    The file has no name and is gone when the last tensor over it is. Nothing of it is left in RAM,
    until it is read. Not to be written to. Raises InvalidRequestError where the folder cannot be
    written to, MemoryBudgetError where it is full.
    """
    if not x.numel():
        return x.clone()
    where = folder or tempfile.gettempdir()
    try:
        with tempfile.NamedTemporaryFile(prefix="quire-kv-", dir=where) as file:
            file.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())  # only what has been written can be dropped from RAM
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            mapped = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype)
    except OSError as error:
        if error.errno in _FULL:
            raise MemoryBudgetError(
                f"{where} has no room for {x.nbytes:,} more bytes of KV.",
                value=x.nbytes,
                action="Make room there, or give another folder.",
            ) from error
        raise _unusable(where, error.strerror) from error
    return mapped.view(x.shape)


def check_folder(folder: str | None) -> None:
    """Raise InvalidRequestError where `on_disk` could not write to ``folder``."""
    where = folder or tempfile.gettempdir()
    if not os.path.isdir(where):
        raise _unusable(where, "no such folder")
    if not os.access(where, os.W_OK | os.X_OK):
        raise _unusable(where, "no permission to write there")


def _unusable(where: str, why: str | None) -> InvalidRequestError:
    return InvalidRequestError(
        f"KV cannot be put into {where!r}: {why}.",
        field="kv",
        value=where,
        action="Give a folder that exists and can be written to.",
    )


def is_on_disk(x: Tensor) -> bool:
    """Whether ``x`` is, or is a part of, what `on_disk` has made."""
    return x.untyped_storage().filename is not None


def read_ahead(x: Tensor, rows: Tensor | None = None) -> None:
    """Ask the system to read ``x``, or ``x[rows]`` (int64), into RAM while something else is done.

    Does nothing for a tensor in RAM, or where there is no such call.
    """
    if not x.numel() or not is_on_disk(x) or not hasattr(mmap, "MADV_WILLNEED"):
        return
    if rows is None and not x.is_contiguous():
        for part in x:
            read_ahead(part)
        return
    assert x.is_contiguous()
    size = x[0].nbytes if x.dim() else x.nbytes
    first = np.zeros(1, np.int64) if rows is None else rows.flatten().numpy() * size
    last = first + (x.nbytes if rows is None else size) - 1
    origin = x.data_ptr() // mmap.PAGESIZE
    offset = x.data_ptr() - origin * mmap.PAGESIZE
    pages = (offset + x.nbytes - 1) // mmap.PAGESIZE + 1
    libc = ctypes.CDLL(None)
    begin, end = ((offset + byte) // mmap.PAGESIZE for byte in (first, last))
    change = np.bincount(begin, minlength=pages + 1) - np.bincount(end + 1, minlength=pages + 1)
    wanted = change.cumsum()[:-1] > 0
    here = np.zeros(pages, np.uint8)
    libc.mincore(*_range(origin, pages), ctypes.c_void_p(here.ctypes.data))
    wanted &= here & 1 == 0  # each call costs about as much as reading a page from the cache
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).reshape(-1, 2)
    for start, stop in edges.tolist():
        libc.madvise(*_range(origin + start, stop - start), mmap.MADV_WILLNEED)


def _range(page: int, count: int) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    """Start and bytes of ``count`` pages of memory."""
    return ctypes.c_void_p(page * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE)
